"""Linears of several blocks of rows: codes and scales against plain numpy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import StageError
from pipeline.quant.oracle import group_scales, pack_int4, quantize_int4
from pipeline.quant.packing import linear as packing
from pipeline.quant.packing.linear import quantized_tensors
from tests.packed_layers import PRESETS

_ROWS, _COLUMNS = 4100, 512  # blocks of 2048 rows, and a rest of 4
_GROUP_SIZE = 128


def _linear(fmt: str) -> tuple[Any, NDArray[Any]]:
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(_COLUMNS, _ROWS, bias=False)).half()
    config = {**copy.deepcopy(getattr(mtq, PRESETS[fmt])), "algorithm": "max"}
    mtq.quantize(model, config, lambda quantized: quantized(torch.randn(4, _COLUMNS).half()))
    return model[0], model[0].weight.detach().float().numpy()


def _packed(linear: Any, fmt: str) -> dict[str, NDArray[Any]]:
    parts = quantized_tensors(linear, fmt, "it", like_modelopt=False)
    return {
        suffix: (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x).numpy()
        for suffix, x in parts
    }


def test_sizes_are_several_blocks() -> None:
    blocks = list(packing._row_blocks(torch.empty(_ROWS, _COLUMNS)))
    assert [(block.start, block.stop) for block in blocks] == [
        (0, 2048),
        (2048, 4096),
        (4096, 6144),
    ]


def test_int4() -> None:
    linear, weight_NK = _linear("int4_awq")
    scale_NG = group_scales(weight_NK, _GROUP_SIZE)
    packed = _packed(linear, "int4_awq")
    np.testing.assert_array_equal(packed["weight_scale"], scale_NG)
    np.testing.assert_array_equal(packed["weight"], pack_int4(quantize_int4(weight_NK, scale_NG)))


def test_int8() -> None:
    linear, weight_NK = _linear("int8_wo")
    scale_N = np.abs(weight_NK).max(axis=1) / np.float32(127)
    packed = _packed(linear, "int8_wo")
    np.testing.assert_array_equal(packed["weight_scale"], scale_N)
    np.testing.assert_array_equal(packed["weight"], np.rint(weight_NK / scale_N[:, None]))


def test_fp8() -> None:
    import ml_dtypes

    linear, weight_NK = _linear("fp8")
    scale = np.abs(weight_NK).max() / np.float32(448)
    packed = _packed(linear, "fp8")
    assert packed["weight_scale"] == scale
    codes_NK = (weight_NK / scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(packed["weight"], codes_NK.view(np.uint8))


def test_zero_points() -> None:
    random = np.random.default_rng(0)
    codes_NK = random.integers(-8, 8, (_ROWS, _COLUMNS)).astype(np.int8)
    zero_NG = random.integers(-8, 8, (_ROWS, _COLUMNS // _GROUP_SIZE)).astype(np.int8)
    scale_NG = random.uniform(0.01, 0.1, zero_NG.shape).astype(np.float32)
    steps_NK = codes_NK - np.repeat(zero_NG, _GROUP_SIZE, axis=1).astype(np.float32)
    linear = nn.Linear(_COLUMNS, _ROWS, bias=False)
    weight_NK = steps_NK * np.repeat(scale_NG, _GROUP_SIZE, axis=1)
    linear.weight = nn.Parameter(torch.from_numpy(weight_NK).bfloat16())
    linear.register_buffer("weight_scale_NG", torch.from_numpy(scale_NG))
    linear.register_buffer("weight_zero_point_NG", torch.from_numpy(zero_NG))
    packed = _packed(linear, "int4_gptq")
    np.testing.assert_array_equal(packed["weight"], pack_int4(codes_NK))
    np.testing.assert_array_equal(packed["weight_scale"], scale_NG)
    np.testing.assert_array_equal(packed["weight_zero_point"], zero_NG)


def test_infinite_weights_are_refused() -> None:
    linear, _ = _linear("int4_awq")
    linear.weight.data[4099, 511] = float("inf")
    with pytest.raises(StageError, match=r"it\.weight: holds values that are not finite"):
        _packed(linear, "int4_awq")
