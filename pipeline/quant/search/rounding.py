"""Fake quantization of blocks of rows, bit for bit what ModelOpt's quantizers compute on a CPU.

All arithmetic is float32, the result is rounded to the weight's dtype and returned as float32. Only a
block of rows is ever in float32, never a whole weight.

Shape suffixes: N output features, K input features, R rows of a block, G groups of S input features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 1 << 22
"""Elements of a block of rows: 16 MB in float32."""

INT4_MAX = 7.0
_ZERO_AMAX = 1.0 / (1 << 24)  # ModelOpt: a group below this is all zeros


def row_blocks(weight_NK: torch.Tensor) -> Iterator[slice]:
    """Slices of consecutive rows that together are the weight."""
    rows = max(1, BLOCK_ELEMENTS // weight_NK.shape[1])
    for start in range(0, len(weight_NK), rows):
        yield slice(start, min(start + rows, len(weight_NK)))


def group_amax(w_RK: torch.Tensor, group_size: int) -> torch.Tensor:
    """The largest magnitude of each group: float32 [R, G]."""
    return w_RK.view(len(w_RK), -1, group_size).abs().amax(-1).float()


def int4_groups(w_RK: torch.Tensor, amax_RG: torch.Tensor) -> torch.Tensor:
    """Symmetric int4: codes -8 to 7 times amax / 7, one amax for each group.

    Args:
        w_RK: in the weight's dtype, which the result is rounded to.
        amax_RG: float32.
    """
    num_rows, num_groups = amax_RG.shape
    grouped = w_RK.float().view(num_rows, num_groups, -1)
    if grouped.data_ptr() == w_RK.data_ptr():
        grouped = grouped.clone()  # float32 weights: never write into them
    zero = (amax_RG <= _ZERO_AMAX).unsqueeze(-1)
    scale = _over(INT4_MAX, amax_RG).unsqueeze(-1).masked_fill_(zero, 0.0)
    grouped.mul_(scale).round_().clamp_(-8.0, 7.0).div_(scale.masked_fill_(zero, 1.0))
    return _through_dtype(grouped.view_as(w_RK), w_RK.dtype)


def int4_nearest(w_RK: torch.Tensor, group_size: int) -> torch.Tensor:
    """Symmetric int4 with the range of each group of the weight itself."""
    return int4_groups(w_RK, group_amax(w_RK, group_size))


def int8_rows(w_RK: torch.Tensor) -> torch.Tensor:
    """Symmetric int8: codes -128 to 127 times amax / 127, one amax for each row."""
    amax_R1 = w_RK.abs().amax(-1, keepdim=True).float()
    zero = amax_R1 <= _ZERO_AMAX
    scale = _over(127.0, amax_R1).masked_fill_(zero, 0.0)
    codes = (w_RK.float() * scale).round_().clamp_(-128.0, 127.0)
    return _through_dtype(codes.div_(scale.masked_fill_(zero, 1.0)), w_RK.dtype)


def fp8_tensor(w_RK: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """E4M3 with one scale for the whole tensor; `amax` float32, a number."""
    safe = torch.where(amax <= _ZERO_AMAX, torch.ones_like(amax), amax)
    scale = 448.0 / safe
    codes = (w_RK.float() * scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
    return _through_dtype(codes.float().mul_(1 / scale), w_RK.dtype)


def _over(value: float, tensor: torch.Tensor) -> torch.Tensor:
    """value / tensor, rounded once: torch computes number / tensor as number * (1 / tensor)."""
    return torch.full_like(tensor, value) / tensor


def _through_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values if dtype == torch.float32 else values.to(dtype).float()
