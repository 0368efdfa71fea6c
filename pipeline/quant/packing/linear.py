"""One quantized linear as tensors: codes by ModelOpt's own packing, scales as its exporter names them.

Shape suffixes: N output features, P = N / 2 packed rows, K input features, G groups of K,
R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.oracle import HIGHEST_CODE, LOWEST_CODE

MODELOPT_FORMATS = {
    "int4_awq": "int4_awq",
    "w4a8_awq": "w4a8_awq",
    "int8_wo": "int8_wo",
    "int8_sq": "int8_sq",
    "fp8": "fp8",
}
"""Our name -> the name inside ModelOpt."""

_BLOCK_WEIGHTS = 2**20
"""How many weights are rounded at a time."""

_ON_GRID = 0.25
"""How far from a whole number weight / scale may be when codes are read back; rounding to float16
moves it by 15 * 2**-11 at most, to bfloat16 by 15 * 2**-8."""


def quantized_tensors(
    linear: nn.Module, fmt: str, where: str, *, like_modelopt: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(suffix, tensor) of a quantized linear, without bias and pre-quant scale.

    Args:
        linear: quantized by ModelOpt (or, int4_gptq, with the two buffers of its scales).
        fmt: a key of `recipe.ALGORITHMS`.
        where: the linear's name, for errors.
        like_modelopt: divide FP8 weights by their scale in their own dtype, as ModelOpt's exporter
            does, which rounds twice. False: in float32, as its fake quantizing does.

    Raises:
        StageError: a scale or weight that is not finite.
    """
    from modelopt.torch.export.quant_utils import (
        get_activation_scaling_factor,
        get_weight_block_size,
        get_weight_scaling_factor,
        get_weight_scaling_factor_2,
        to_quantized_weight,
    )

    assert isinstance(linear.weight, torch.Tensor)
    weight_NK = linear.weight.detach()
    _refuse_not_finite(weight_NK, where)
    if fmt == "int4_gptq":
        yield from _with_zero_points(linear, weight_NK, where)
        return
    scale = get_weight_scaling_factor(linear)
    widened = fmt == "fp8" and not like_modelopt
    if fmt == "fp8":
        scale = scale.reshape(())  # which does not widen float16
    codes = torch.cat(
        [
            to_quantized_weight(
                weight_NK[rows].float() if widened else weight_NK[rows],
                scale[rows] if scale.dim() else scale,
                MODELOPT_FORMATS[fmt],
                block_size=get_weight_block_size(linear),
            )
            for rows in _row_blocks(weight_NK)
        ]
    )
    yield "weight", codes
    yield "weight_scale", scale
    if fmt == "w4a8_awq":
        yield "weight_scale_2", get_weight_scaling_factor_2(linear).squeeze()
    if fmt in ("w4a8_awq", "fp8", "int8_sq"):
        yield "input_scale", get_activation_scaling_factor(linear).squeeze()


def _with_zero_points(
    linear: nn.Module, weight_NK: torch.Tensor, where: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """code = weight / scale + zero_point; the weight lies on that grid already."""
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    scale_NG, zero_NG = linear.weight_scale_NG, linear.weight_zero_point_NG
    assert isinstance(scale_NG, torch.Tensor)
    assert isinstance(zero_NG, torch.Tensor)
    group_size = weight_NK.shape[1] // scale_NG.shape[1]
    packed = []
    for rows in _row_blocks(weight_NK):
        scale_RK = scale_NG[rows].repeat_interleave(group_size, dim=1)
        steps_RK = weight_NK[rows].float() / scale_RK
        codes_RK = steps_RK.round() + zero_NG[rows].repeat_interleave(group_size, dim=1)
        off_grid = float((steps_RK - steps_RK.round()).abs().max())
        assert off_grid < _ON_GRID, f"{where}: weights lie {off_grid} steps beside their codes"
        beyond = (codes_RK < LOWEST_CODE) | (codes_RK > HIGHEST_CODE)
        assert not bool(beyond.any()), f"{where}: codes beyond {LOWEST_CODE} to {HIGHEST_CODE}"
        packed.append(pack_int4_in_uint8(codes_RK, torch.ones_like(scale_NG[rows]), group_size))
    yield "weight", torch.cat(packed)
    yield "weight_scale", scale_NG.float()
    yield "weight_zero_point", zero_NG.to(torch.int8)


def _row_blocks(weight_NK: torch.Tensor) -> Iterator[slice]:
    """Even numbers of rows, so that what is computed in float32 stays small."""
    num_rows, num_columns = weight_NK.shape
    step = max(_BLOCK_WEIGHTS // num_columns // 2 * 2, 2)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _refuse_not_finite(values: torch.Tensor, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise StageError(Problem(f"{where}.weight", "holds values that are not finite"))
