"""Conversion of stored values to the dtype of the target, counting every value that would be lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.errors import Problem

FLOAT16_MAX = 65504.0

Array = npt.NDArray[Any]


@dataclass
class _Losses:
    not_finite: int = 0
    too_large: int = 0
    largest: float = 0.0


class Caster:
    """Casts blocks of tensors and remembers, per source tensor, what did not fit."""

    def __init__(self, *, allow_not_finite: bool = False) -> None:
        self._allow_not_finite = allow_not_finite
        self._losses: dict[str, _Losses] = {}

    def cast(self, name: str, values: Array, dtype: str) -> Array:
        """`values` of source tensor `name` as safetensors dtype `dtype`.

        U8 to I8 keeps the bytes. Floats are rounded to nearest even, or widened to F32; NaN, Inf and
        values beyond the range of float16 end up in `problems`.
        """
        target = NUMPY_DTYPES[dtype]
        if target.kind == "i":
            return values.view(target)
        if values.dtype == target:
            if _has_not_finite(values):
                self._note(name, values, values)
            return values
        if target == np.float32:
            return self.cast(name, values.astype(np.float32), dtype)
        assert target == np.float16, f"{name}: no cast from {values.dtype} to {dtype}"
        with np.errstate(over="ignore"):  # counted below
            narrow = values.astype(np.float16)
        if _has_not_finite(narrow):
            self._note(name, values.astype(np.float32), narrow)
        return narrow

    @property
    def problems(self) -> list[Problem]:
        """One problem for each tensor that lost a value."""
        problems = []
        for name, losses in self._losses.items():
            if losses.not_finite and not self._allow_not_finite:
                what = f"{losses.not_finite} values are NaN or Inf"
                fix = "repair the weights, or keep them so with convert.allow_not_finite: true"
                problems.append(Problem(name, what, fix=fix))
            if losses.too_large:
                what = (
                    f"{losses.too_large} values do not fit float16, the largest is "
                    f"{losses.largest:.6g}"
                )
                problems.append(Problem(name, what, f"-{FLOAT16_MAX:.0f} to {FLOAT16_MAX:.0f}"))
        return problems

    @property
    def not_finite(self) -> dict[str, int]:
        """Source tensor -> how many of its values are NaN or Inf."""
        return {name: loss.not_finite for name, loss in self._losses.items() if loss.not_finite}

    def _note(self, name: str, before: Array, after: Array) -> None:
        losses = self._losses.setdefault(name, _Losses())
        finite = np.isfinite(before)
        losses.not_finite += int(before.size - np.count_nonzero(finite))
        lost = finite & ~np.isfinite(after)
        if lost.any():
            losses.too_large += int(np.count_nonzero(lost))
            losses.largest = max(losses.largest, float(np.abs(before[lost]).max()))


def _has_not_finite(values: Array) -> bool:
    """Whether there is a NaN or Inf; in float16 these are the greatest bit patterns of each sign."""
    if values.size == 0:
        return False
    if values.dtype == np.float16:
        return bool(values.view(np.int16).max() >= 0x7C00 or values.view(np.uint16).max() >= 0xFC00)
    return not bool(np.isfinite(values).all())
