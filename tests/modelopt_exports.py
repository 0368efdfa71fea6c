"""One tiny model of any architecture, quantized by ModelOpt, and what its two exporters make of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.tiny_models import write_tiny

DECODERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Phi3ForCausalLM": "phi3",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt",
}
"""What ModelOpt's TensorRT-LLM exporter takes, and its name for it."""
WITHOUT_CONFIG = {"Gemma2ForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM"}
"""It makes the rank tensors of these, but then refuses to write config.json."""
PRESETS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
}
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # tp 4 repeats them
    "num_hidden_layers": 2,
    "vocab_size": 320,
}
EXTRA: dict[str, dict[str, Any]] = {
    "GemmaForCausalLM": {"head_dim": 32},
    "Gemma2ForCausalLM": {"head_dim": 32},
    "MistralForCausalLM": {"head_dim": 32},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Phi3ForCausalLM": {"rope_scaling": None, "partial_rotary_factor": 1.0},
    "FalconForCausalLM": {"ffn_hidden_size": 512},
}
WITHOUT_KV_HEADS = ("GPT2LMHeadModel", "GPTNeoXForCausalLM")
GROUP_SIZE = 64


@dataclass(frozen=True)
class Exports:
    """Directories: weights before, unified layout after, TensorRT-LLM checkpoint of each (tp, pp)."""

    plain: Path
    unified: Path
    trtllm: dict[tuple[int, int], Path]


def write_plain(architecture: str, directory: Path, **overrides: Any) -> Path:
    """A float16 checkpoint whose linears can be cut four times in groups of 64."""
    sizes = {**SIZES, **EXTRA.get(architecture, {}), **overrides}
    if architecture in WITHOUT_KV_HEADS:
        del sizes["num_key_value_heads"]
    return write_tiny(architecture, directory, **sizes)


def load(directory: Path, dtype: str = "float16") -> Any:
    """The transformers model. Falcon's linears become ordinary ones, which compute the same: the class
    of their own is calibrated by ModelOpt, but then exported as it was (0.47)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "FalconLinear":
                linear = torch.nn.Linear(1, 1, bias=child.bias is not None, device="meta")
                linear.weight, linear.bias = child.weight, child.bias
                setattr(module, name, linear)
    return model


def quantize(model: Any, name: str, group_size: int = GROUP_SIZE) -> Any:
    """Calibrated on random tokens. ModelOpt knows no head by the name that GPT-NeoX gives it."""
    import modelopt.torch.quantization as mtq
    import torch

    config = copy.deepcopy(getattr(mtq, PRESETS[name]))
    for entry in config["quant_cfg"]:
        cfg = entry.get("cfg") or {}
        for one in cfg if isinstance(cfg, list) else [cfg]:
            if -1 in (one.get("block_sizes") or {}):
                one["block_sizes"][-1] = group_size
    config["quant_cfg"].append({"quantizer_name": "*embed_out*", "enable": False})
    torch.manual_seed(0)
    batch = torch.randint(0, model.config.vocab_size, (4, 32))
    return mtq.quantize(model, config, lambda quantized: quantized(batch))


def export_trtllm(model: Any, architecture: str, directory: Path, tp: int, pp: int) -> Path:
    """ModelOpt's TensorRT-LLM exporter. It changes scales of the model that it is given."""
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    vocab_size = model.config.vocab_size
    with torch.inference_mode(), _config_for(architecture):
        export_tensorrt_llm_checkpoint(
            model,
            DECODERS[architecture],
            torch.float16,
            directory,
            inference_tensor_parallel=tp,
            inference_pipeline_parallel=pp,
        )
    model.config.vocab_size = vocab_size  # the exporter leaves the padded size behind
    return directory


def export_both(
    directory: Path, architecture: str, name: str, mappings: Iterable[tuple[int, int]], **sizes: Any
) -> Exports:
    """Both exports of one model, the unified one last: it then has the scales that the other has
    averaged or joined, and the two can be compared to the bit."""
    from modelopt.torch.export import export_hf_checkpoint

    plain = write_plain(architecture, directory / "plain", **sizes)
    model = quantize(load(plain), name)
    trtllm = {
        (tp, pp): export_trtllm(model, architecture, directory / f"trtllm-{tp}-{pp}", tp, pp)
        for tp, pp in mappings
    }
    export_hf_checkpoint(model, export_dir=directory / "unified")
    return Exports(plain, directory / "unified", trtllm)


def export_unified(directory: Path, architecture: str, name: str, **sizes: Any) -> Exports:
    """The unified layout alone, as it is usually made."""
    from modelopt.torch.export import export_hf_checkpoint

    plain = write_plain(architecture, directory / "plain", **sizes)
    model = quantize(load(plain), name)
    export_hf_checkpoint(model, export_dir=directory / "unified")
    return Exports(plain, directory / "unified", {})


@contextmanager
def _config_for(architecture: str) -> Any:
    if architecture not in WITHOUT_CONFIG:
        yield
        return

    def config(model_config: Any, *_: Any, **__: Any) -> dict[str, Any]:
        world_size = model_config.tensor_parallel * model_config.pipeline_parallel
        return {
            "rank": model_config.rank,
            "mapping": {"world_size": world_size},
            "quantization": {},
            "architecture": architecture,
            "decoder": DECODERS[architecture],
        }

    target = "modelopt.torch.export.model_config_export.convert_to_tensorrt_llm_config"
    with patch(target, config):
        yield
