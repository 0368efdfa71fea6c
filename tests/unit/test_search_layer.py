"""quantize_layer: formats, mixtures, shared scales, experts, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pipeline.errors import StageError
from pipeline.quant.recipe import ALGORITHMS, LayerRecipe
from pipeline.quant.search.layer import quantize_layer
from tests.search_models import (
    LLAMA_LINEARS,
    batches,
    forward_loop,
    inputs_of,
    linear_of,
    one_layer_model,
)

QKV = LLAMA_LINEARS[:3]
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def _recipe(format_: str, algorithm: str, group_size: int = 64, **fields: Any) -> LayerRecipe:
    formats = dict.fromkeys(LLAMA_LINEARS, format_)
    return LayerRecipe(formats, {format_: algorithm}, group_size, **fields)


def _effective_weight(linear: Any) -> torch.Tensor:
    """What the module computes with the unscaled input, float64 [N, K]; activations not rounded."""
    weight_NK = linear.weight_quantizer(linear.weight.detach()).double()
    scale = linear.input_quantizer.pre_quant_scale
    return weight_NK if scale is None else weight_NK * scale.double()


WEIGHT_ONLY = [
    (format_, algorithm)
    for format_ in ("int4_awq", "int4_gptq", "int8_wo", "int8_sq", "fp8")
    for algorithm in ALGORITHMS[format_]
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("format_", "algorithm"), WEIGHT_ONLY)
def test_loss_is_the_error_of_what_the_module_computes(
    format_: str, algorithm: str, dtype: torch.dtype
) -> None:
    model, tokens = one_layer_model(dtype=dtype), batches()
    inputs = inputs_of(model, LLAMA_LINEARS, tokens)
    original = {name: linear_of(model, name).weight.detach().double() for name in LLAMA_LINEARS}
    facts = quantize_layer(model, _recipe(format_, algorithm), forward_loop(tokens))
    assert list(facts) == list(LLAMA_LINEARS)
    for name, found in facts.items():
        error_NK = _effective_weight(linear_of(model, name)) - original[name]
        expected = float((inputs[name] @ error_NK.t()).square().mean())
        assert found.loss == pytest.approx(expected, rel=1e-4), name  # observed at most 3e-5
        assert found.num_tokens == len(inputs[name]) == 512
        assert found.rtn_loss is not None
        assert found.format == format_
        if format_ != "int8_sq":
            assert found.loss <= found.rtn_loss


@pytest.mark.parametrize("format_", ["int4_awq", "w4a8_awq"])
def test_linears_that_read_one_tensor_have_one_scale(format_: str) -> None:
    model = one_layer_model(dtype=torch.float16)
    facts = quantize_layer(model, _recipe(format_, "awq"), forward_loop(batches()))
    for names in (QKV, GATE_UP):
        scales = [linear_of(model, name).input_quantizer.pre_quant_scale for name in names]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        assert len({facts[name].alpha for name in names}) == 1
    assert facts["self_attn.q_proj"].algorithm == "awq"
    if format_ == "w4a8_awq":
        for names in (QKV, GATE_UP):
            linears = [linear_of(model, name) for name in names]
            assert len({float(linear.weight_quantizer[1].amax) for linear in linears}) == 1
            assert len({float(linear.input_quantizer.amax) for linear in linears}) == 1


def test_linears_of_attention_and_mlp_that_read_one_norm_have_one_scale() -> None:
    """Falcon's parallel layers: what is folded into the norm must be right for both."""
    model = one_layer_model(
        "FalconForCausalLM",
        ffn_hidden_size=512,
        new_decoder_architecture=False,
        parallel_attn=True,
        multi_query=True,
    )
    names = ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    recipe = LayerRecipe(dict.fromkeys(names, "int4_awq"), {"int4_awq": "awq"}, 64)
    facts = quantize_layer(model, recipe, forward_loop(batches(2)))
    left, right = (linear_of(model, name).input_quantizer.pre_quant_scale for name in names)
    assert torch.equal(left, right)
    assert {found.algorithm for found in facts.values()} == {"awq"}


def test_mixed_formats_leave_the_rest_alone() -> None:
    model, tokens = one_layer_model(dtype=torch.float16), batches()
    before = copy.deepcopy(model.state_dict())
    formats = {
        **dict.fromkeys(QKV, "int4_awq"),
        "self_attn.o_proj": "fp16",
        "mlp.gate_proj": "fp8",
        "mlp.up_proj": "fp8",
        "mlp.down_proj": "int4_gptq",
    }
    ways = {"int4_awq": "awq_clip", "fp8": "max", "int4_gptq": "gptq"}
    facts = quantize_layer(
        model, LayerRecipe(formats, ways, 128, kv_cache="fp8"), forward_loop(tokens)
    )
    assert {name: found.format for name, found in facts.items()} == {
        name: format_ for name, format_ in formats.items() if format_ != "fp16"
    }
    after = model.state_dict()
    for name in ("model.layers.0.self_attn.o_proj.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert not linear_of(model, name).weight_quantizer.is_enabled
    attention = linear_of(model, "self_attn")
    assert float(attention.k_bmm_quantizer.amax) > 0
    assert float(attention.v_bmm_quantizer.amax) > 0
    assert bool(torch.isfinite(model(tokens[0]).logits).all())


def test_zero_points_are_integers_and_the_weight_lies_on_their_grid() -> None:
    model = one_layer_model()
    quantize_layer(model, _recipe("int4_gptq", "gptq"), forward_loop(batches()))
    for name in LLAMA_LINEARS:
        linear = linear_of(model, name)
        scale_NG, zero_NG = linear.weight_scale_NG, linear.weight_zero_point_NG
        num_outputs, num_inputs = linear.weight.shape
        assert scale_NG.shape == zero_NG.shape == (num_outputs, num_inputs // 64)
        assert scale_NG.dtype == torch.float32
        assert zero_NG.dtype == torch.int8
        codes = linear.weight.view(num_outputs, -1, 64) / scale_NG[..., None] + zero_NG[..., None]
        assert float((codes - codes.round()).abs().max()) < 1e-4
        assert int(codes.round().min()) == -8
        assert int(codes.round().max()) == 7


def test_round_to_nearest_is_kept_where_a_scale_does_not_help() -> None:
    model, tokens = one_layer_model(), batches()
    linear = linear_of(model, "self_attn.o_proj")
    with torch.no_grad():  # already on the grid: any scale can only be worse
        codes_NG = torch.randint(-6, 7, (256, 4, 64), generator=torch.Generator().manual_seed(2))
        codes_NG[:, :, 0] = 7
        linear.weight.copy_((codes_NG * 0.01).view(256, 256))
        before_NK = linear.weight.clone()
    facts = quantize_layer(model, _recipe("int4_awq", "awq"), forward_loop(tokens))
    found = facts["self_attn.o_proj"]
    assert (found.algorithm, found.alpha) == ("rtn", None)
    assert found.loss == found.rtn_loss
    assert found.note == "awq was not better than round-to-nearest, which was kept"
    assert linear.input_quantizer.pre_quant_scale is None
    assert torch.equal(linear.weight, before_NK)


def _mixtral_linears(model: Any) -> list[str]:
    return [
        name.removeprefix("model.layers.0.")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("gate", "lm_head"))
    ]


@pytest.mark.parametrize("format_", ["int4_awq", "w4a8_awq", "int8_sq", "fp8", "int4_gptq"])
def test_experts_share_scales_and_those_without_tokens_are_named(format_: str) -> None:
    model: Any = one_layer_model(
        "MixtralForCausalLM", torch.float16, num_local_experts=4, num_experts_per_tok=1
    )
    with torch.no_grad():  # expert 2 is never chosen: the others' logits are +-x, so one is above 0
        gate = model.model.layers[0].block_sparse_moe.gate.weight
        gate[2] = 0.0
        gate[1] = -gate[0]
    names = _mixtral_linears(model)
    recipe = LayerRecipe(dict.fromkeys(names, format_), {format_: ALGORITHMS[format_][0]}, 64)
    facts = quantize_layer(model, recipe, forward_loop(batches()))
    assert set(facts) == set(names)
    for name, found in facts.items():
        assert (found.num_tokens == 0) == ("experts.2." in name)
        assert ("no calibration token reached this linear" in found.note) == ("experts.2." in name)
        assert (found.loss is None) == ("experts.2." in name)
    assert sum(found.num_tokens for name, found in facts.items() if name.endswith("w1")) == 512
    if format_ != "int4_gptq":
        _check_shared(model, format_)
    assert bool(torch.isfinite(model(batches()[0]).logits).all())


def _check_shared(model: Any, format_: str) -> None:
    experts = model.model.layers[0].block_sparse_moe.experts
    for linears in (
        [linear for expert in experts for linear in (expert.w1, expert.w3)],
        [expert.w2 for expert in experts],
    ):
        quantizers = [linear.input_quantizer for linear in linears]
        if format_ != "fp8":
            scales = [quantizer.pre_quant_scale for quantizer in quantizers]
            assert all(torch.equal(scale, scales[0]) for scale in scales)
        if format_ != "int4_awq":
            assert len({float(quantizer.amax) for quantizer in quantizers}) == 1


@pytest.mark.parametrize("search", ["gram", "modelopt"])
def test_default_dtype_changes_nothing(search: Any) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = one_layer_model(dtype=torch.bfloat16)
        torch.set_default_dtype(dtype)
        try:
            quantize_layer(
                model, _recipe("int4_awq", "awq", search=search), forward_loop(batches(2))
            )
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(linear_of(model, "mlp.down_proj").weight)
    assert torch.equal(*found)


def test_input_that_is_not_finite_is_named() -> None:
    model = one_layer_model(dtype=torch.float16)
    with torch.no_grad():
        linear_of(model, "mlp.up_proj").weight.mul_(60000.0)
    with pytest.raises(StageError) as raised:
        quantize_layer(model, _recipe("int4_awq", "awq"), forward_loop(batches()))
    assert str(raised.value) == (
        "mlp.down_proj: its input is not finite; fix: check the weights for NaN and "
        "infinity; a model made for bfloat16 can overflow in float16"
    )


@pytest.mark.parametrize("format_", ["int4_awq", "int8_wo", "fp8", "int4_gptq"])
def test_weight_that_is_not_finite_is_named(format_: str) -> None:
    model = one_layer_model()
    with torch.no_grad():
        linear_of(model, "mlp.down_proj").weight[3, 5] = torch.inf
    with pytest.raises(StageError) as raised:
        quantize_layer(model, _recipe(format_, ALGORITHMS[format_][0]), forward_loop(batches()))
    assert str(raised.value) == (
        "mlp.down_proj.weight: holds values that are not finite; fix: check the checkpoint"
    )
