"""Rounding of blocks of rows equals ModelOpt's quantizers bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.search.rounding import fp8_tensor, group_amax, int4_nearest, int8_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _quantizer(**fields: Any) -> Any:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(**fields))


def _calibrated(quantizer: Any, weight_NK: torch.Tensor) -> torch.Tensor:
    from modelopt.torch.quantization.model_calib import (
        enable_stats_collection,
        finish_stats_collection,
    )

    enable_stats_collection(quantizer)
    quantizer(weight_NK)
    finish_stats_collection(quantizer)
    rounded: torch.Tensor = quantizer(weight_NK)
    return rounded.float()


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """[N, 128] of any dtype and size, with zeros, whole rows of zeros, and ties between codes."""
    num_rows = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight_NK = torch.randn(num_rows, 128, generator=generator)
    weight_NK *= 10.0 ** draw(st.integers(-4, 3))
    if draw(st.booleans()):
        weight_NK = (weight_NK * 4).round() / 4
    weight_NK[
        torch.rand(weight_NK.shape, generator=generator) < draw(st.sampled_from([0, 0.5]))
    ] = 0
    weight_NK[torch.rand(num_rows, generator=generator) < 0.2] = 0.0
    return weight_NK.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=60)
@given(weights(), st.sampled_from([32, 64, 128]))
def test_int4(weight_NK: torch.Tensor, group_size: int) -> None:
    quantizer = _quantizer(num_bits=4, block_sizes={-1: group_size, "type": "static"})
    expected = _calibrated(quantizer, weight_NK)
    before_NK = weight_NK.clone()
    assert torch.equal(int4_nearest(weight_NK, group_size), expected)
    assert torch.equal(weight_NK, before_NK)
    assert torch.equal(
        group_amax(weight_NK, group_size).view(-1, 1), quantizer.amax.float().view(-1, 1)
    )


@settings(max_examples=40)
@given(weights())
def test_int8(weight_NK: torch.Tensor) -> None:
    expected = _calibrated(_quantizer(num_bits=8, axis=0), weight_NK)
    assert torch.equal(int8_rows(weight_NK), expected)


@settings(max_examples=40)
@given(weights())
def test_fp8(weight_NK: torch.Tensor) -> None:
    expected = _calibrated(_quantizer(num_bits=(4, 3), axis=None), weight_NK)
    assert torch.equal(fp8_tensor(weight_NK, weight_NK.abs().amax().float()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_of_rows_is_rounded_like_the_whole(dtype: torch.dtype) -> None:
    weight_NK = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int4_nearest(weight_NK, 64)
    assert torch.equal(torch.cat([int4_nearest(weight_NK[::2], 64)]), whole[::2])
