"""Tiny models quantized by ModelOpt as a whole, and cut into models of one layer each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.quant.recipe import LayerRecipe
from tests.tiny_models import write_tiny

PRESETS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
}
NUM_LAYERS = 2
GROUP_SIZE = 64
_VOCAB_SIZE = 300

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": _VOCAB_SIZE,
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_inner": 192},
    "Phi3ForCausalLM": {"rope_scaling": None},
    "FalconForCausalLM": {"ffn_hidden_size": 192, "num_kv_heads": 4},
}
_NOT_ALL = {
    "FalconForCausalLM": ("head_dim",),
    "GPTNeoXForCausalLM": ("head_dim", "num_key_value_heads"),
}


def write_small(architecture: str, directory: Path, **overrides: Any) -> Path:
    """A random model of two layers whose sizes are multiples of `GROUP_SIZE`."""
    left_out = _NOT_ALL.get(architecture, ())
    sizes = {name: size for name, size in _SIZES.items() if name not in left_out}
    fields = {**sizes, **_OWN_SIZES.get(architecture, {}), **overrides}
    return write_tiny(architecture, directory, **fields)


def load_small(directory: Path, dtype: str = "float16") -> Any:
    """The model, with nn.Linear for GPT-2's Conv1D; eager, or Gemma 2 forgets the cap of its scores."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            num_inputs, num_outputs = module.weight.shape
            linear = torch.nn.Linear(num_inputs, num_outputs, dtype=module.weight.dtype)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    return model


def batches() -> list[Any]:
    """The calibration data."""
    import torch

    torch.manual_seed(0)
    return [torch.randint(0, _VOCAB_SIZE, (4, 32)) for _ in range(2)]


def quantize_whole(model: Any, fmt: str, *, kv_cache: bool = False, algorithm: Any = None) -> Any:
    """ModelOpt's own quantizing of everything but the head."""
    import modelopt.torch.quantization as mtq

    config = preset(fmt, algorithm)
    if kv_cache:
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"]
    return mtq.quantize(model, config, lambda whole: [whole(batch) for batch in batches()])


def preset(fmt: str, algorithm: Any = None) -> dict[str, Any]:
    """ModelOpt's own config of a format, with our group size, for everything but the head."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, PRESETS[fmt]))
    for entry in config["quant_cfg"]:
        cfgs = entry.get("cfg") or {}
        for cfg in cfgs if isinstance(cfgs, list) else [cfgs]:
            if -1 in (cfg.get("block_sizes") or {}):
                cfg["block_sizes"][-1] = GROUP_SIZE
    config["quant_cfg"].append({"quantizer_name": "*embed_out*", "enable": False})
    if algorithm is not None:
        config["algorithm"] = algorithm
    return config


def cut(model: Any) -> Iterator[tuple[str, Any]]:
    """For each layer its prefix in `model`, and a copy of the model with that layer alone."""
    from torch import nn

    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    path = min(lists, key=len)
    parent, _, leaf = path.rpartition(".")
    layers = list(model.get_submodule(path))
    for number, layer in enumerate(layers):
        setattr(model.get_submodule(parent), leaf, nn.ModuleList([layer]))
        mini = copy.deepcopy(model)
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers))
        yield f"{path}.{number}.", mini


def linears_of(mini: Any, prefix: str) -> list[str]:
    """Linears of the only layer of `mini` that formats are for, by their names within the layer.

    Args:
        prefix: of the layer in the whole model.
    """
    from torch import nn

    inside = re.sub(r"\.\d+\.$", ".0.", prefix)
    return [
        name.removeprefix(inside)
        for name, module in mini.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(inside)
        and not name.endswith("block_sparse_moe.gate")
    ]


def minis(model: Any, fmt: str, **recipe: Any) -> Iterator[tuple[Any, LayerRecipe]]:
    """The layers of a quantized model, each with what was done to it."""
    from torch import nn

    enabled = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_enabled(getattr(module, "weight_quantizer", None))
    ]
    for prefix, mini in cut(model):
        inside = [name.removeprefix(prefix) for name in enabled if name.startswith(prefix)]
        formats = dict.fromkeys(inside, fmt)
        yield mini, LayerRecipe(formats, {fmt: "awq"}, GROUP_SIZE, **recipe)


def _is_enabled(quantizer: Any) -> bool:
    return quantizer is not None and bool(quantizer.is_enabled)


def share_scales(model: Any, *, spread: float = 0.5, seed: int = 0) -> None:
    """Give every quantized linear a random pre-quant scale, those that read one input the same.

    What a joint search would leave behind, on a model that was quantized with `algorithm="max"`.
    """
    import torch
    from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth

    random = torch.Generator().manual_seed(seed)
    scales: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not _is_enabled(
            getattr(module, "weight_quantizer", None)
        ):
            continue
        inputs: Any = module.input_quantizer
        key = name
        for pattern, shared in _SHARED_INPUTS:
            key = re.sub(pattern, shared, key)
        if key not in scales:
            scale_K = torch.exp(torch.randn(module.in_features, generator=random) * spread)
            # ModelOpt keeps the scale in the weight's dtype, but divides the weight by what it gets.
            scales[key] = scale_K.to(module.weight.dtype).float()
        if inputs.amax is not None:
            inputs._amax_for_smoothing = inputs.amax * torch.ones(module.in_features)
        with torch.no_grad():
            apply_pre_quant_scale_and_smooth(module, scales[key])


_SHARED_INPUTS = (
    (r"\.[qkv]_proj$", ".qkv"),
    (r"\.(gate|up)_proj$", ".gate_up"),
    (r"\.experts\.\d+\.w[13]$", ".fc"),
    (r"\.experts\.\d+\.w2$", ".proj"),
)
