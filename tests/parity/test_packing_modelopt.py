"""`search: modelopt`: layers packed one by one against ModelOpt's export of the whole model, bit for
bit.

What ModelOpt 0.47 does to each architecture is in `EXPLICIT` (linears that keep a pre-quant scale of
their own; all others are folded) and in the tests of what it cannot do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.models import ARCHITECTURES, shape_from_hf
from pipeline.quant.packing.config import matrices, quant_config_json
from pipeline.quant.packing.layer import pack_layer
from pipeline.quant.recipe import LayerRecipe
from tests.packed_layers import (
    GROUP_SIZE,
    NUM_LAYERS,
    batches,
    cut,
    linears_of,
    load_small,
    minis,
    preset,
    quantize_whole,
    write_small,
)

_LLAMA = {"self_attn.o_proj", "mlp.down_proj"}
_EXPERTS = {f"block_sparse_moe.experts.{e}.w{w}" for e in range(4) for w in (1, 2, 3)}
# It folds the mean of several linears that share the output of a norm. A fused linear is alone.
EXPLICIT = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Phi3ForCausalLM": {*_LLAMA, "self_attn.qkv_proj", "mlp.gate_up_proj"},
    "GPT2LMHeadModel": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "GPTNeoXForCausalLM": {
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    },
    "MixtralForCausalLM": {"self_attn.o_proj", *_EXPERTS},
}
NOT_EXPORTED = {"FalconForCausalLM"}


def _export(model: Any, directory: Path) -> Path:
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(model, export_dir=directory)
    return directory


def _pack(model: Any, fmt: str, **recipe: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """All layers' tensors, and the format of every linear by its full name."""
    tensors: dict[str, Any] = {}
    formats: dict[str, str] = {}
    for layer, (mini, layer_recipe) in enumerate(minis(model, fmt, search="modelopt", **recipe)):
        packed = pack_layer(mini, layer_recipe, layer)
        prefix = next(iter(packed)).partition(f".{layer}.")[0]
        tensors |= packed
        formats |= {f"{prefix}.{layer}.{name}": fmt for name in layer_recipe.formats}
    return tensors, formats


def _assert_exported(tensors: dict[str, Any], directory: Path) -> None:
    """The same tensors, but for those outside the layers."""
    import torch
    from safetensors.torch import load_file

    theirs = load_file(directory / "model.safetensors")
    layers = {name for name in theirs if any(f".{layer}." in name for layer in range(NUM_LAYERS))}
    assert tensors.keys() == layers
    for name in layers:
        ours = tensors[name]
        assert (ours.dtype, ours.shape) == (theirs[name].dtype, theirs[name].shape), name
        as_bytes = [x.reshape(-1).view(torch.uint8) for x in (ours, theirs[name])]
        assert torch.equal(*as_bytes), name


def _assert_described(formats: dict[str, str], directory: Path, kv_cache: Any = "fp16") -> None:
    config = json.loads((directory / "config.json").read_text())
    hf_quant_config = json.loads((directory / "hf_quant_config.json").read_text())
    shape = shape_from_hf(config)
    ours = quant_config_json(shape, formats, group_size=GROUP_SIZE, kv_cache=kv_cache)
    assert ours.hf_quant_config == hf_quant_config
    assert ours.quantization_config == config["quantization_config"]


_LIKE_LLAMA = ("MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in _LIKE_LLAMA else name
        for name in EXPLICIT
    ],
)
def test_awq_is_bit_identical(tmp_path: Path, architecture: str) -> None:
    model = quantize_whole(load_small(write_small(architecture, tmp_path / "plain")), "int4_awq")
    tensors, formats = _pack(model, "int4_awq")
    _assert_exported(tensors, _export(model, tmp_path / "theirs"))
    _assert_described(formats, tmp_path / "theirs")
    found = (re.fullmatch(r"[a-z_.]+\.1\.(.+)\.pre_quant_scale", name) for name in tensors)
    explicit = {match[1] for match in found if match}
    assert explicit == EXPLICIT[architecture]


@pytest.mark.parametrize(
    ("architecture", "fmt", "kv_cache"),
    [
        ("LlamaForCausalLM", "w4a8_awq", False),
        ("LlamaForCausalLM", "fp8", True),
        ("LlamaForCausalLM", "int8_sq", False),
        ("LlamaForCausalLM", "int8_wo", False),
        ("GPT2LMHeadModel", "fp8", True),
        ("GPTNeoXForCausalLM", "int8_sq", False),
        ("MixtralForCausalLM", "fp8", False),
        pytest.param("MixtralForCausalLM", "int8_sq", False, marks=pytest.mark.slow),
        pytest.param("Phi3ForCausalLM", "w4a8_awq", True, marks=pytest.mark.slow),
    ],
)
def test_other_formats_are_bit_identical(
    tmp_path: Path, architecture: str, fmt: str, kv_cache: bool
) -> None:
    model = load_small(write_small(architecture, tmp_path / "plain"))
    model = quantize_whole(model, fmt, kv_cache=kv_cache)
    cache = "fp8" if kv_cache else "fp16"
    tensors, formats = _pack(model, fmt, kv_cache=cache)
    _assert_exported(tensors, _export(model, tmp_path / "theirs"))
    _assert_described(formats, tmp_path / "theirs", cache)
    assert kv_cache == any(name.endswith("k_proj.k_scale") for name in tensors)


@pytest.mark.parametrize(
    "algorithm", ["max", "awq_clip", pytest.param("awq_full", marks=pytest.mark.slow)]
)
def test_other_algorithms_are_bit_identical(tmp_path: Path, algorithm: Any) -> None:
    model = load_small(write_small("LlamaForCausalLM", tmp_path / "plain"))
    model = quantize_whole(model, "int4_awq", algorithm=algorithm)
    tensors, _ = _pack(model, "int4_awq")
    _assert_exported(tensors, _export(model, tmp_path / "theirs"))


def test_bfloat16_is_bit_identical(tmp_path: Path) -> None:
    """Gemma, whose norms are 1 + w."""
    source = write_small("GemmaForCausalLM", tmp_path / "plain", dtype="bfloat16")
    model = quantize_whole(load_small(source, "bfloat16"), "int4_awq")
    tensors, _ = _pack(model, "int4_awq")
    _assert_exported(tensors, _export(model, tmp_path / "theirs"))


def test_mixed_formats_are_bit_identical(tmp_path: Path) -> None:
    """Attention in int4, one MLP linear plain, the rest FP8: tensors, and both descriptions."""
    import modelopt.torch.quantization as mtq

    def fp8(name: str) -> list[dict[str, Any]]:
        cfg = {"num_bits": (4, 3), "axis": None}
        return [
            {"quantizer_name": f"*mlp.{name}_proj.{kind}_quantizer", "cfg": cfg, "enable": True}
            for kind in ("weight", "input")
        ]

    config = preset("int4_awq", "max")
    config["quant_cfg"] += [
        {"quantizer_name": "*mlp*", "enable": False},
        *fp8("gate"),
        *fp8("up"),
        {"quantizer_name": "*layers.1.mlp.down_proj*", "enable": False},
        {"quantizer_name": "*lm_head*", "enable": False},
    ]
    model = load_small(write_small("LlamaForCausalLM", tmp_path / "plain"))
    model = mtq.quantize(model, config, lambda whole: [whole(batch) for batch in batches()])
    tensors: dict[str, Any] = {}
    formats: dict[str, str] = {}
    for layer, (prefix, mini) in enumerate(cut(model)):
        mine = {name: "int4_awq" for name in linears_of(mini, prefix) if "attn" in name}
        mine |= {"mlp.gate_proj": "fp8", "mlp.up_proj": "fp8"}
        recipe = LayerRecipe(mine, {}, GROUP_SIZE, search="modelopt")
        tensors |= pack_layer(mini, recipe, layer)
        formats |= {f"{prefix}{name}": fmt for name, fmt in mine.items()}
    _assert_exported(tensors, _export(model, tmp_path / "theirs"))
    _assert_described(formats, tmp_path / "theirs")


def test_zero_points_are_described(tmp_path: Path) -> None:
    """Of which ModelOpt knows nothing: alone, and among others."""
    source = write_small("LlamaForCausalLM", tmp_path / "plain")
    shape = shape_from_hf(json.loads((source / "config.json").read_text()))
    names = [name for name in matrices(shape) if ".layers." in name]
    facts = {
        "quant_algo": "W4A16_GPTQ",
        "group_size": 64,
        "has_zero_point": True,
        "pre_quant_scale": False,
    }
    alone = quant_config_json(shape, dict.fromkeys(names, "int4_gptq"), group_size=64)
    assert alone.hf_quant_config["quantization"] == {
        **facts,
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "model.embed_tokens"],
    }
    formats = {name: "int4_gptq" if "mlp" in name else "int4_awq" for name in names}
    mixed = quant_config_json(shape, formats, group_size=64, kv_cache="int8")
    quantization = mixed.hf_quant_config["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert quantization["kv_cache_quant_algo"] == "INT8"
    assert quantization["quantized_layers"]["model.layers.1.mlp.up_proj"] == facts
    groups = mixed.quantization_config["config_groups"].values()
    assert [group["weights"].get("symmetric", True) for group in groups] == [True, False]
    assert sum(len(group["targets"]) for group in groups) == len(names) == 14


def test_every_architecture_is_compared_or_listed() -> None:
    assert EXPLICIT.keys() | NOT_EXPORTED == ARCHITECTURES.keys()


def test_modelopt_leaves_falcon_unpacked(tmp_path: Path) -> None:
    """ModelOpt searches Falcon's scales, but its exporter packs no module of the class FalconLinear: the
    file says W4A16_AWQ and holds scaled float16 weights. Ours are packed, and otherwise the same."""
    import torch
    from safetensors.torch import load_file

    model = load_small(write_small("FalconForCausalLM", tmp_path / "plain"))
    model = quantize_whole(model, "int4_awq")
    tensors, formats = _pack(model, "int4_awq")
    theirs = load_file(_export(model, tmp_path / "theirs") / "model.safetensors")
    _assert_described(formats, tmp_path / "theirs")
    assert {name for name in tensors if name not in theirs} == {
        f"{name}.weight_scale" for name in formats
    }
    for name, ours in tensors.items():
        if name.removesuffix(".weight") in formats:
            assert theirs[name].dtype == torch.float16
            assert ours.dtype == torch.uint8
        elif not name.endswith(".weight_scale"):
            assert torch.equal(ours, theirs[name]), name


@pytest.mark.slow
def test_modelopt_dies_on_w4a8_experts(tmp_path: Path) -> None:
    """Its exporter sets a range of another shape. Ours skips that step, which has nothing to do."""
    model = load_small(write_small("MixtralForCausalLM", tmp_path / "plain"))
    model = quantize_whole(model, "w4a8_awq")
    tensors, _ = _pack(model, "w4a8_awq")
    for expert in range(4):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}."
        assert tensors[f"{prefix}w1.weight_scale_2"] == tensors[f"{prefix}w3.weight_scale_2"]
    with pytest.raises(RuntimeError, match="Changing shape when setting amax"):
        _export(model, tmp_path / "theirs")
