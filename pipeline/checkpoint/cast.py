"""Conversion of stored values to the dtype of the target, counting every value that would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.findings import Findings, Losses

Array = npt.NDArray[Any]


class Caster:
    """Casts blocks of tensors; what did not fit goes into `findings`."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def cast(
        self,
        name: str,
        values: Array,
        dtype: str,
        *,
        target: str = "",
        checked: tuple[slice, ...] | None = (),
    ) -> Array:
        """`values` of source tensor `name` as safetensors dtype `dtype`.

        U8 to I8 keeps the bytes. Floats are rounded to nearest even, or widened to F32; NaN, Inf and
        values beyond the range of float16 are counted.

        Args:
            target: the tensor that is made of them.
            checked: which of the values to look at; None: none of them.
        """
        numpy_dtype = NUMPY_DTYPES[dtype]
        if numpy_dtype.kind == "i":
            return values.view(numpy_dtype)
        cast = values
        if values.dtype != numpy_dtype:
            assert numpy_dtype in (np.float16, np.float32), f"{name}: {values.dtype} to {dtype}"
            with np.errstate(over="ignore"):  # counted below
                cast = values.astype(numpy_dtype)
        if checked is not None:
            seen = np.asarray(cast[checked])  # a single number would come as no array
            if _has_not_finite(seen):
                losses = _losses(np.asarray(values[checked]), seen)
                self._findings.add_losses(name, target, losses)
        return cast


def _losses(values: Array, cast: Array) -> Losses:
    with np.errstate(over="ignore"):
        before = values.astype(np.float32)
    finite = np.isfinite(before)
    lost = finite & ~np.isfinite(cast)
    return Losses(
        not_finite=int(before.size - np.count_nonzero(finite)),
        too_large=int(np.count_nonzero(lost)),
        largest=float(np.abs(before[lost]).max()) if lost.any() else 0.0,
    )


def _has_not_finite(values: Array) -> bool:
    """Whether there is a NaN or Inf; in float16 these are the greatest bit patterns of each sign."""
    if values.size == 0:
        return False
    if values.dtype == np.float16:
        return bool(values.view(np.int16).max() >= 0x7C00 or values.view(np.uint16).max() >= 0xFC00)
    return not bool(np.isfinite(values).all())
