"""Checkpoints in ModelOpt's unified layout with random codes and scales, in every format.

Made without a quantizer and without our tables, so for every architecture, also where ModelOpt fails.
Linears that TensorRT-LLM joins share what it has only once (the seed is that of the joined linear);
experts have scales of their own.
Shapes: N output features, K input features, G groups of GROUP_SIZE.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.hand_slices import Rank, Slice, layer_slices, sizes_of

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

GROUP_SIZE = 64
TARGETS = {
    "weight": "weight",
    "weight_scale": "weights_scaling_factor",
    "weight_scale_2": "weights_scaling_factor_2",
    "weight_zero_point": "weights_zero_point",
    "pre_quant_scale": "prequant_scaling_factor",
    "input_scale": "activation_scaling_factor",
}
"""Name in the unified layout -> name in a rank file."""
_ALGORITHMS: dict[str, dict[str, Any]] = {
    "int4_awq": {"quant_algo": "W4A16_AWQ", "pre_quant_scale": True},
    "int4_gptq": {"quant_algo": "W4A16_GPTQ", "has_zero_point": True},
    "w4a8_awq": {"quant_algo": "W4A8_AWQ", "pre_quant_scale": True},
    "fp8": {"quant_algo": "FP8"},
    "int8_sq": {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
    "int8_wo": {"quant_algo": "W8A16"},
}
FORMATS = tuple(_ALGORITHMS)
PACKED = ("int4_awq", "int4_gptq", "w4a8_awq")


def random_linear(name: str, joined: str, shape_NK: tuple[int, int], fmt: str) -> Tensors:
    """What one linear is in a format; float8 codes are bytes that are finite numbers."""
    own, shared = (np.random.default_rng(zlib.crc32(text.encode())) for text in (name, joined))
    n, k = shape_NK
    scale = {"scale": own.uniform(0.01, 0.02), "input": own.uniform(0.1, 0.2)}
    if ".experts." not in name:
        scale["input"] = shared.uniform(0.1, 0.2)
    common = shared.uniform(0.01, 0.02)
    prequant = {"pre_quant_scale": shared.uniform(0.5, 2.0, k).astype(np.float16)}
    active = {"input_scale": np.array(scale["input"], np.float32)}
    if fmt in PACKED:
        groups = (n, k // GROUP_SIZE)
        tensors: Tensors = {
            "weight": own.integers(0, 256, (n // 2, k), np.uint8),
            "weight_scale": own.uniform(0.01, 0.02, groups).astype(np.float32),
        }
        if fmt == "int4_gptq":
            return tensors | {"weight_zero_point": own.integers(-8, 7, groups, np.int8)}
        if fmt == "w4a8_awq":
            return tensors | prequant | active | {"weight_scale_2": np.array(common, np.float32)}
        return tensors | prequant
    if fmt == "fp8":
        codes = own.integers(0, 0x7F, (n, k), np.uint8) | (
            own.integers(0, 2, (n, k), np.uint8) << 7
        )
        return {"weight": codes, "weight_scale": np.array(common, np.float32), **active}
    rows = own.uniform(0.0005, 0.001, n).astype(np.float32)
    tensors = {"weight": own.integers(-127, 128, (n, k), np.int8), "weight_scale": rows}
    return tensors if fmt == "int8_wo" else tensors | prequant | active


def full_config(plain: Path) -> dict[str, Any]:
    """config.json with every field, those of a default included, and the usual name for layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(plain)
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {**fields, "num_hidden_layers": config.num_hidden_layers}


def plain_linears(plain: Path) -> dict[str, Tensors]:
    """The linears of the layers of a plain checkpoint, as [out, in]."""
    from safetensors.numpy import load_file

    config = full_config(plain)
    stored = load_file(plain / "model.safetensors")
    weights = {
        part.name: stored[f"{part.name}.weight"]
        for layer in range(config["num_hidden_layers"])
        for stack in layer_slices(
            config["architectures"][0], sizes_of(config), layer, Rank(1, 0)
        ).values()
        for joined in stack
        for part in joined
    }
    is_conv1d = config["model_type"] == "gpt2"
    return {name: {"weight": x.T if is_conv1d else x} for name, x in weights.items()}


def write_quantized(plain: Path, directory: Path, fmt: str) -> dict[str, Tensors]:
    """A plain checkpoint with all linears of its layers replaced; returns those by name."""
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    shutil.copy(plain / "config.json", directory)
    config = full_config(plain)
    architecture, sizes = config["architectures"][0], sizes_of(config)
    stored = dict(load_file(plain / "model.safetensors"))
    linears: dict[str, Tensors] = {}
    for layer in range(config["num_hidden_layers"]):
        targets = layer_slices(architecture, sizes, layer, Rank(1, 0))
        for target, stack in targets.items():
            for expert, joined in enumerate(stack):
                for part in joined:
                    weight = stored.pop(f"{part.name}.weight")
                    n, k = len(part.rows), len(part.columns)
                    assert sorted(weight.shape) == sorted((n, k))
                    seed = f"{layer}.{target}.{expert}"
                    linears[part.name] = random_linear(part.name, seed, (n, k), fmt)
    for name, tensors in linears.items():
        for suffix, values in tensors.items():
            tensor = torch.from_numpy(np.ascontiguousarray(values).reshape(values.shape))
            if fmt == "fp8" and suffix == "weight":
                tensor = tensor.view(torch.float8_e4m3fn)
            stored[f"{name}.{suffix}"] = tensor
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    fields = {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **_ALGORITHMS[fmt]}
    if fmt in PACKED:
        fields["group_size"] = GROUP_SIZE
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))
    return linears


def expected(linears: dict[str, Tensors], stack: list[list[Slice]], fmt: str) -> Tensors:
    """What a rank file holds of a linear, by suffix; float8 as bytes."""
    stacked = ".experts." in stack[0][0].name
    found: Tensors = {}
    for suffix in linears[stack[0][0].name]:
        if suffix == "input_scale":
            scales = [one[suffix] for name, one in linears.items() if _same_input(name, stack)]
            found[TARGETS[suffix]] = np.max(scales).reshape(1)
            continue
        parts = [_joined(linears, joined, suffix, fmt) for joined in stack]
        found[TARGETS[suffix]] = np.stack(parts) if stacked else parts[0]
    return found


def _same_input(name: str, stack: list[list[Slice]]) -> bool:
    """All experts have one scale for their input, whichever of them a rank holds."""
    own = [part.name for part in stack[0]]
    layer, expert, _ = own[0].partition(".experts.")
    if not expert:
        return name in own
    parts = {one.rpartition(".")[2] for one in own}
    return name.startswith(layer) and name.rpartition(".")[2] in parts


def _joined(linears: dict[str, Tensors], joined: list[Slice], suffix: str, fmt: str) -> Array:
    packed = fmt in PACKED and suffix == "weight"
    values = [_cut(linears[part.name][suffix], suffix, part, packed) for part in joined]
    if suffix == "pre_quant_scale" or values[0].shape == (1,):
        assert all(np.array_equal(value, values[0]) for value in values), suffix
        return values[0]
    return np.concatenate(values)


def _cut(values: Array, suffix: str, part: Slice, packed: bool) -> Array:
    if values.ndim == 0:
        return values.reshape(1)
    if suffix == "pre_quant_scale":
        return values[part.columns]
    if values.ndim == 1:
        return values[part.rows]
    if suffix in ("weight_scale", "weight_zero_point"):
        return values[part.rows][:, np.unique(part.columns // GROUP_SIZE)]
    if not packed:
        return values[part.rows][:, part.columns]
    nibbles = np.stack([values & 15, values >> 4], axis=1).reshape(-1, values.shape[1])
    cut = nibbles[part.rows][:, part.columns]
    return cut[0::2] | (cut[1::2] << 4)
