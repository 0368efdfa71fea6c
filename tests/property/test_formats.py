"""Cutting int4 tensors commutes with dequantizing them, whatever the shape and the mapping."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.layout import TargetTensor, layer_targets, mapping_problems
from pipeline.models import ModelShape
from pipeline.parallel import mappings, part, shard
from pipeline.quant.formats import FORMATS


def dequantize(packed: np.ndarray, scale: np.ndarray, group_size: int) -> np.ndarray:
    """[out/2, in] bytes, [out, in/g] scales -> [out, in]; element by element, for this test alone."""
    out = np.empty((packed.shape[0] * 2, packed.shape[1]), np.float32)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            byte = int(packed[row // 2, column]) & 0xFF
            code = byte >> 4 if row % 2 else byte & 15
            code = code - 16 if code > 7 else code
            out[row, column] = code * scale[row, column // group_size]
    return out


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    num_kv_heads = draw(st.sampled_from([1, 2, 4]))
    return ModelShape(
        architecture="LlamaForCausalLM",
        hidden_size=draw(st.sampled_from([4, 8, 12])),
        num_layers=1,
        num_heads=num_kv_heads * draw(st.sampled_from([1, 2, 4])),
        num_kv_heads=num_kv_heads,
        head_size=draw(st.sampled_from([2, 4, 6])),
        intermediate_size=draw(st.sampled_from([8, 16, 24])),
        vocab_size=7,
        max_position_embeddings=8,
        norm_epsilon=1e-5,
        rotary_base=1e4,
        rotary_scaling=None,
        hidden_act="silu",
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
    )


def by_linear(targets: list[TargetTensor]) -> dict[str, dict[str, TargetTensor]]:
    linears: dict[str, dict[str, TargetTensor]] = {}
    for target in targets:
        linear, suffix = target.name.rsplit(".", 1)
        linears.setdefault(linear, {})[suffix] = target
    return {name: tensors for name, tensors in linears.items() if len(tensors) > 1}


@given(shapes(), st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_cut_then_dequantize(shape: ModelShape, tp: int, group_size: int, seed: int) -> None:
    fmt = FORMATS["int4_awq"].with_group_size(group_size)
    assume(not mapping_problems(shape, fmt, tp, 1))
    random = np.random.default_rng(seed)
    linears = by_linear(layer_targets(shape, fmt, 0, 0))
    assert len(linears) == 5
    for tensors in linears.values():
        packed, scales = tensors["weight"], tensors["weights_scaling_factor"]
        for weight, scale in zip(packed.sources, scales.sources, strict=True):
            codes = random.integers(-128, 128, weight.shape).astype(np.int8)
            factors = random.normal(size=scale.shape).astype(np.float32)
            whole = dequantize(codes, factors, group_size)
            for mapping in mappings(tp, 1):
                mine = dequantize(
                    shard(codes, weight.dims, mapping),
                    shard(factors, scale.dims, mapping),
                    group_size,
                )
                rows = part(weight.dims[0], mapping)
                columns = part(weight.dims[1], mapping)
                wanted = whole[2 * rows.start : 2 * rows.stop, columns.start : columns.stop]
                np.testing.assert_array_equal(mine, wanted)
