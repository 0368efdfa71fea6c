"""From the search to the file and back: what `quantize_layer` evaluates is what `pack_layer` stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StageError
from pipeline.quant.packing.activations import simulate_inputs
from pipeline.quant.packing.in_memory import PackedTensors, dequantized_layer
from pipeline.quant.packing.layer import pack_layer
from pipeline.quant.recipe import ALGORITHMS, LayerRecipe
from pipeline.quant.search.layer import quantize_layer
from tests.packed_layers import GROUP_SIZE, batches, cut, linears_of, load_small, write_small

_MIXED = {
    "self_attn.q_proj": "int4_awq",
    "self_attn.k_proj": "int4_awq",
    "self_attn.v_proj": "int4_awq",
    "self_attn.o_proj": "int8_wo",
    "mlp.gate_proj": "fp16",
    "mlp.up_proj": "fp8",
    "mlp.down_proj": "int4_awq",
}


def _forward(mini: Any) -> Any:
    import torch

    with torch.no_grad():
        return [mini(batch).logits for batch in batches()]


def _quantize(
    directory: Path,
    architecture: str,
    dtype: str,
    recipe: Callable[[list[str]], LayerRecipe],
) -> tuple[str, Any, Any, dict[str, Any]]:
    """Layer 1: its prefix, the plain mini, the quantized one, and its tensors."""
    source = write_small(architecture, directory / "plain", dtype=dtype)
    _, (prefix, mini) = cut(load_small(source, dtype))
    _, (_, plain) = cut(load_small(source, dtype))
    of_layer = recipe(linears_of(mini, prefix))
    quantize_layer(mini, of_layer, _forward)
    return prefix, plain, mini, pack_layer(mini, of_layer, 1)


@pytest.mark.parametrize(
    ("architecture", "fmt", "algorithm"),
    [
        *(
            ("LlamaForCausalLM", fmt, algorithm)
            for fmt in ("int4_awq", "int4_gptq", "int8_wo")
            for algorithm in ALGORITHMS[fmt]
        ),
        ("GPT2LMHeadModel", "int4_gptq", "gptq"),
        ("MixtralForCausalLM", "int4_awq", "awq_clip"),
    ],
)
def test_weights_only(tmp_path: Path, architecture: str, fmt: str, algorithm: str) -> None:
    """float32: logits of the plain layer with the stored values == those of the quantized layer."""

    def recipe(linears: list[str]) -> LayerRecipe:
        return LayerRecipe(dict.fromkeys(linears, fmt), {fmt: algorithm}, GROUP_SIZE)

    _, plain, mini, tensors = _quantize(tmp_path, architecture, "float32", recipe)
    values = dequantized_layer(tensors)
    assert any(".weight_scale" in name for name in tensors)
    state = {name.replace(".1.", ".0.", 1): tensor for name, tensor in values.items()}
    assert plain.load_state_dict(state, strict=False).unexpected_keys == []
    for wanted, got in zip(_forward(mini), _forward(plain), strict=True):
        difference = float((got - wanted).abs().max() / wanted.abs().max())
        # int8 weights are not left rounded: some ties fall to the other side.
        assert difference < (2e-3 if fmt == "int8_wo" else 1e-5)  # seen: 4e-4, 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", ["int4_awq", "int4_gptq"])
def test_stored_weights_are_those_evaluated(tmp_path: Path, fmt: str, dtype: str) -> None:
    """16 bits: the weight that the quantized layer multiplies with is the stored one, rounded to the
    dtype. A few codes between two steps fall to the other side: ModelOpt's quantizer divides in the
    dtype of the weight, the file is made in float32."""
    import torch

    def recipe(linears: list[str]) -> LayerRecipe:
        algorithm = ALGORITHMS[fmt][0]
        return LayerRecipe(dict.fromkeys(linears, fmt), {fmt: algorithm}, GROUP_SIZE)

    prefix, _, mini, tensors = _quantize(tmp_path, "LlamaForCausalLM", dtype, recipe)
    unit = torch.finfo(getattr(torch, dtype)).eps
    # A scale beside the weight is in the read-back value, but not in the evaluated weight.
    explicit = {name: tensors.pop(name) for name in list(tensors) if "pre_quant" in name}
    assert len(explicit) == (2 if fmt == "int4_awq" else 0)
    values = dequantized_layer(tensors)
    for linear in linears_of(mini, prefix):
        module = mini.get_submodule(prefix.replace(".1.", ".0.") + linear)
        evaluated = module.weight_quantizer(module.weight).float()
        stored = values[f"{prefix}{linear}.weight"]
        off = (stored - evaluated).abs() > unit * evaluated.abs()
        assert off.float().mean() <= 1e-3, (
            linear
        )  # seen: 1e-4 (float16), 4e-4 (bfloat16); int4_gptq 0


def test_several_formats_in_one_layer(tmp_path: Path) -> None:
    """Each linear in its own format; gate and up share an input, but one of them has no scale."""

    def recipe(_linears: list[str]) -> LayerRecipe:
        algorithms = {fmt: ALGORITHMS[fmt][0] for fmt in ("int4_awq", "int8_wo", "fp8")}
        return LayerRecipe(_MIXED, algorithms, GROUP_SIZE, kv_cache="int8")

    prefix, plain, mini, tensors = _quantize(tmp_path, "LlamaForCausalLM", "float32", recipe)
    found = {
        name: {key.removeprefix(f"{prefix}{name}.") for key in tensors if f"{prefix}{name}." in key}
        for name in _MIXED
    }
    int4 = {"weight", "weight_scale", "bias"}
    assert found == {
        "self_attn.q_proj": int4,
        "self_attn.k_proj": int4 | {"k_scale"},
        "self_attn.v_proj": int4 | {"v_scale"},
        "self_attn.o_proj": int4,
        "mlp.gate_proj": {"weight", "bias"},
        "mlp.up_proj": int4 | {"input_scale"},
        "mlp.down_proj": int4 | {"pre_quant_scale"},
    }
    key_range = mini.model.layers[0].self_attn.k_bmm_quantizer.amax
    assert tensors[f"{prefix}self_attn.k_proj.k_scale"] == key_range / 127
    state = {
        name.replace(prefix, "model.layers.0."): tensor
        for name, tensor in dequantized_layer(tensors).items()
    }
    assert plain.load_state_dict(state, strict=False).unexpected_keys == []
    assert simulate_inputs(plain.model.layers[0], PackedTensors(tensors), prefix) == 1
    for name in ("k_bmm_quantizer", "v_bmm_quantizer"):
        getattr(mini.model.layers[0].self_attn, name).disable()
    for wanted, got in zip(_forward(mini), _forward(plain), strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 5e-3  # seen: 5e-4


def test_ones_where_tensorrt_llm_wants_a_scale(tmp_path: Path) -> None:
    """Its reader of W4A16_AWQ looks for a scale beside linears that are not fused, and only there."""
    import torch

    def recipe(linears: list[str]) -> LayerRecipe:
        return LayerRecipe(dict.fromkeys(linears, "int4_awq"), {"int4_awq": "rtn"}, GROUP_SIZE)

    prefix, _, _, tensors = _quantize(tmp_path, "LlamaForCausalLM", "bfloat16", recipe)
    scales = {name: tensors[name] for name in tensors if name.endswith(".pre_quant_scale")}
    assert scales.keys() == {
        f"{prefix}{linear}.pre_quant_scale" for linear in ("self_attn.o_proj", "mlp.down_proj")
    }
    for name, scale_K in scales.items():
        width = tensors[name.replace("pre_quant_scale", "weight")].shape[1]
        assert torch.equal(scale_K, torch.ones(width, dtype=torch.bfloat16))


@pytest.mark.parametrize("fmt", ["fp8", "w4a8_awq"])
def test_experts_share_what_an_engine_has_once(tmp_path: Path, fmt: str) -> None:
    """One input scale for all w1 and w3, one for all w2; one scale of the weight for an expert's two."""

    def recipe(linears: list[str]) -> LayerRecipe:
        algorithms = {fmt: ALGORITHMS[fmt][0]}
        return LayerRecipe(dict.fromkeys(linears, fmt), algorithms, GROUP_SIZE)

    prefix, _, _, tensors = _quantize(tmp_path, "MixtralForCausalLM", "float16", recipe)
    weight_scale = "weight_scale" if fmt == "fp8" else "weight_scale_2"
    experts = f"{prefix}block_sparse_moe.experts."
    for names in (("w1", "w3"), ("w2",)):
        linears = [f"{experts}{number}.{name}." for number in range(4) for name in names]
        assert len({float(tensors[f"{name}input_scale"]) for name in linears}) == 1
        if fmt == "w4a8_awq":
            first = tensors[f"{linears[0]}pre_quant_scale"]
            assert all(tensors[f"{name}pre_quant_scale"].equal(first) for name in linears)
    for number in range(4):
        pair = [float(tensors[f"{experts}{number}.{name}.{weight_scale}"]) for name in ("w1", "w3")]
        assert pair[0] == pair[1]
    qkv = [float(tensors[f"{prefix}self_attn.{x}_proj.{weight_scale}"]) for x in "qkv"]
    assert len(set(qkv)) == 1


def test_zero_points_are_stored(tmp_path: Path) -> None:
    """(code - zero point) * scale, computed here from the bytes, is the evaluated weight."""
    import torch

    def recipe(linears: list[str]) -> LayerRecipe:
        return LayerRecipe(dict.fromkeys(linears, "int4_gptq"), {"int4_gptq": "gptq"}, GROUP_SIZE)

    prefix, _, mini, tensors = _quantize(tmp_path, "Qwen2ForCausalLM", "float32", recipe)
    name = f"{prefix}mlp.down_proj"
    packed, zero_NG = tensors[f"{name}.weight"], tensors[f"{name}.weight_zero_point"]
    assert (packed.dtype, zero_NG.dtype) == (torch.uint8, torch.int8)
    assert int(zero_NG.abs().max()) > 0
    low, high = (packed & 15).to(torch.int16), (packed >> 4).to(torch.int16)
    codes_NK = torch.stack([low, high], dim=1).flatten(0, 1)
    codes_NK = torch.where(codes_NK > 7, codes_NK - 16, codes_NK)
    zero_NK = zero_NG.repeat_interleave(GROUP_SIZE, dim=1)
    scale_NK = tensors[f"{name}.weight_scale"].repeat_interleave(GROUP_SIZE, dim=1)
    evaluated = mini.model.layers[0].mlp.down_proj.weight
    torch.testing.assert_close((codes_NK - zero_NK) * scale_NK, evaluated, rtol=1e-6, atol=0)
    assert not any("pre_quant" in key for key in tensors)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def recipe(linears: list[str]) -> LayerRecipe:
        return LayerRecipe(dict.fromkeys(linears, "int8_wo"), {"int8_wo": "rtn"}, GROUP_SIZE)

    source = write_small("LlamaForCausalLM", tmp_path / "plain")
    (prefix, mini), _ = cut(load_small(source))
    of_layer = recipe(linears_of(mini, prefix))
    quantize_layer(mini, of_layer, _forward)
    mini.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(
        StageError, match=r"layers\.7\.mlp\.up_proj\.weight: holds values that are not"
    ):
        pack_layer(mini, of_layer, 7)
