"""Layers with one scale for all linears of an input: folded, packed, read back, run by transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.models import ARCHITECTURES
from pipeline.quant.packing.activations import simulate_inputs
from pipeline.quant.packing.in_memory import PackedTensors, dequantized_layer
from pipeline.quant.packing.layer import pack_layer
from tests.packed_layers import (
    batches,
    load_small,
    minis,
    quantize_whole,
    share_scales,
    write_small,
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
# Norm -> the linears whose scale it takes: written down from the models' code.
FOLDED: dict[str, dict[str, tuple[str, ...]]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": {"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATE_UP},
    "Phi3ForCausalLM": {
        "input_layernorm": ("self_attn.qkv_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
    },
    "GPT2LMHeadModel": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    "GPTNeoXForCausalLM": {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    "FalconForCausalLM": {
        "ln_attn": ("self_attention.query_key_value",),
        "ln_mlp": ("mlp.dense_h_to_4h",),
    },
    "MixtralForCausalLM": {"input_layernorm": _QKV},  # the other norm feeds the router, too
}
EXPLICIT: dict[str, int] = dict.fromkeys(FOLDED, 2) | {"MixtralForCausalLM": 1 + 3 * 4}


def _quantized(directory: Path, architecture: str, fmt: str, dtype: str, **overrides: Any) -> Any:
    source = write_small(architecture, directory / "plain", dtype=dtype, **overrides)
    algorithm = None if fmt == "int8_sq" else "max"
    model = quantize_whole(load_small(source, dtype), fmt, algorithm=algorithm)
    if fmt in ("int4_awq", "w4a8_awq"):
        share_scales(model)
    return model


def _packed(model: Any, fmt: str) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for layer, (mini, recipe) in enumerate(minis(model, fmt)):
        tensors |= pack_layer(mini, recipe, layer)
    return tensors


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(batches()[0]).logits


@pytest.mark.parametrize(
    ("architecture", "fmt", "limit"),
    [
        *((architecture, "int4_awq", 1e-5) for architecture in ARCHITECTURES),  # seen: 1e-6
        # 255 steps in float32: ModelOpt multiplies by 1 / scale, so some ties fall to the other side.
        ("Qwen2ForCausalLM", "int8_wo", 1e-3),  # seen: 3e-4
        ("GPT2LMHeadModel", "int8_wo", 1e-3),
    ],
)
def test_read_back_is_what_was_evaluated(
    tmp_path: Path, architecture: str, fmt: str, limit: float
) -> None:
    """float32: logits of a plain model with the packed values == those of ModelOpt's fake quantizing;
    and which norms took scales."""
    model = _quantized(tmp_path, architecture, fmt, "float32")
    before = _logits(model)
    tensors = _packed(model, fmt)
    plain = load_small(tmp_path / "plain", "float32")
    assert plain.load_state_dict(dequantized_layer(tensors), strict=False).unexpected_keys == []
    assert simulate_inputs(plain, PackedTensors(tensors), "") == 0
    difference = float((_logits(plain) - before).abs().max() / before.abs().max())
    assert difference < limit
    if fmt == "int4_awq":
        _assert_folded(tensors, tmp_path / "plain", architecture)


def _assert_folded(tensors: dict[str, Any], source_dir: Path, architecture: str) -> None:
    """These norms change, and their linears have no scale left; all other norms stay as they are."""
    from safetensors.torch import load_file

    source = load_file(source_dir / "model.safetensors")
    layer = next(match[0] for name in tensors if (match := re.match(r"[a-z_.]+\.1\.", name)))
    changed = {
        name.removeprefix(layer).removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.startswith(layer)
        and name.endswith(".weight")
        and tensor.dim() == 1
        and not tensor.equal(source[name])
    }
    assert changed == FOLDED[architecture].keys()
    for linears in FOLDED[architecture].values():
        for linear in linears:
            assert f"{layer}{linear}.weight_scale" in tensors
            assert f"{layer}{linear}.pre_quant_scale" not in tensors
    explicit = [name for name in tensors if name.endswith("pre_quant_scale") and layer in name]
    assert len(explicit) == EXPLICIT[architecture]


@pytest.mark.parametrize(
    ("fmt", "limit"),
    [
        ("w4a8_awq", 1e-6),  # seen: 5e-7
        ("fp8", 1e-6),  # seen: 3e-7
        ("int8_sq", 2e-3),  # seen: 6e-4, one tie; otherwise 3e-7
    ],
)
def test_linears_with_rounded_inputs(tmp_path: Path, fmt: str, limit: float) -> None:
    """Each linear alone: behind one rounding the next may fall to the other side of a tie.

    Two things our networks do otherwise than ModelOpt's fake quantizing: FP8 has one scale for q, k and
    v; W4A8 weights are not rounded to fp8 after int4.
    """
    import torch

    model = _quantized(tmp_path, "LlamaForCausalLM", fmt, "float32")
    if fmt == "fp8":
        _share_qkv_ranges(model)
    tensors = _packed(model, fmt)
    plain = load_small(tmp_path / "plain", "float32")
    plain.load_state_dict(dequantized_layer(tensors), strict=False)
    assert simulate_inputs(plain, PackedTensors(tensors), "") == 14
    for name, module in model.named_modules():
        if f"{name}.input_scale" not in tensors:
            continue
        if fmt == "w4a8_awq":
            module.weight_quantizer[1].disable()
        x_TK = torch.randn(64, module.in_features)
        x_TK *= float(tensors[f"{name}.input_scale"]) * 200  # beyond the range, too
        wanted_TN, x_in_TK = module(x_TK), x_TK
        if f"{name}.pre_quant_scale" not in tensors and fmt == "w4a8_awq":
            x_in_TK = x_TK * module.input_quantizer.pre_quant_scale  # what the norm gives
        difference = (plain.get_submodule(name)(x_in_TK) - wanted_TN).abs().max()
        assert float(difference / wanted_TN.abs().max()) < limit, name


def _share_qkv_ranges(model: Any) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        largest = max(linear.weight_quantizer.amax for linear in linears)
        for linear in linears:
            linear.weight_quantizer.amax = largest.clone()


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel"]
)
def test_norms_are_rounded_once(tmp_path: Path, architecture: str) -> None:
    """bfloat16: the stored norm is the one nearest to norm x scale; so is LayerNorm's bias."""
    import ml_dtypes
    from safetensors.torch import load_file

    model = _quantized(tmp_path, architecture, "int4_awq", "bfloat16")
    tensors = _packed(model, "int4_awq")
    source = load_file(tmp_path / "plain" / "model.safetensors")
    offset = 1.0 if architecture == "GemmaForCausalLM" else 0.0
    layer = "transformer.h.1" if architecture == "GPT2LMHeadModel" else "model.layers.1"
    for norm, linears in FOLDED[architecture].items():
        scale_K = model.get_submodule(f"{layer}.{linears[0]}").input_quantizer.pre_quant_scale
        for leaf in ("weight", "bias"):
            name = f"{layer}.{norm}.{leaf}"
            if name in source:
                wanted_K = (source[name].double() + offset) * scale_K.double() - offset
                nearest_K = wanted_K.numpy().astype(ml_dtypes.bfloat16)
                assert tensors[name].float().numpy().tolist() == nearest_K.tolist(), name


def test_a_norm_that_cannot_hold_the_scale_stays(tmp_path: Path) -> None:
    """Gemma in bfloat16: 1 + w = 0.01 is next to 1 + w = 0.0078, so the scale stays explicit."""
    model = _quantized(tmp_path, "GemmaForCausalLM", "int4_awq", "bfloat16")
    attention = model.model.layers[0].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear.input_quantizer.pre_quant_scale[3] = 0.01
    (mini, recipe), _ = minis(model, "int4_awq")
    before = mini.model.layers[0].input_layernorm.weight.detach().clone()
    tensors = pack_layer(mini, recipe, 0)
    assert tensors["model.layers.0.self_attn.q_proj.pre_quant_scale"][3] == before.new_tensor(0.01)
    assert tensors["model.layers.0.input_layernorm.weight"].equal(before)
    assert "model.layers.0.mlp.gate_proj.pre_quant_scale" not in tensors


def test_falcon_7b_folds_into_the_norm_of_both_branches(tmp_path: Path) -> None:
    """One norm feeds attention and MLP: it takes their scale if that is one, otherwise neither."""
    model = _quantized(
        tmp_path,
        "FalconForCausalLM",
        "int4_awq",
        "float16",
        new_decoder_architecture=False,
        multi_query=True,
        parallel_attn=True,
    )
    branches = ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    (apart, recipe), _ = minis(model, "int4_awq")
    tensors = pack_layer(apart, recipe, 0)
    assert all(f"transformer.h.0.{name}.pre_quant_scale" in tensors for name in branches)
    (shared, recipe), _ = minis(model, "int4_awq")
    scales = [shared.get_submodule(f"transformer.h.0.{name}").input_quantizer for name in branches]
    scales[1].pre_quant_scale = scales[0].pre_quant_scale.clone()
    tensors = pack_layer(shared, recipe, 0)
    assert not any(f"transformer.h.0.{name}.pre_quant_scale" in tensors for name in branches)
    assert sum(name.endswith(".pre_quant_scale") for name in tensors) == 2
