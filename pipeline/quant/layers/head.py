"""lm_head rounded to int8, row by row, while it is copied: never whole in memory.

Shape suffixes: R rows (tokens) of a block, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.dtypes import num_bytes
from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.tensor_reader import RowReader, TensorReader
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ModelShape
from pipeline.models.linears import head_rule

WEIGHT, SCALE = "weight", "weight_scale"
_LARGEST_CODE = np.float32(127.0)
_ZERO_AMAX = np.float32(1e-30)


class Int8Head(RowReader):
    """A TensorReader over a plain checkpoint whose lm_head is int8_wo: codes and a scale for each row.

    W = code * scale with scale = max |W| / 127 of the row, as for the linears of that format. Where the
    model ties its embeddings, the head is made of the table, which stays as it is.
    """

    def __init__(self, inner: TensorReader, shape: ModelShape) -> None:
        rule = head_rule(shape)
        self._inner = inner
        self._source = f"{rule.sources_for(shape)[0].name}.{WEIGHT}"
        self.module = rule.sources[0].name
        info = inner.tensors[self._source]
        made = {
            WEIGHT: replace(info, dtype="I8"),
            SCALE: replace(info, dtype="F32", shape=info.shape[:1]),
        }
        self.names = tuple(f"{self.module}.{suffix}" for suffix in made)
        self.tensors: Mapping[str, TensorInfo] = {
            **inner.tensors,
            **{
                name: replace(one, name=name, nbytes=num_bytes(one.dtype, one.shape))
                for name, one in zip(self.names, made.values(), strict=True)
            },
        }

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of dimension 0.

        Raises:
            CheckpointError: weights of the head that are not finite.
        """
        if name not in self.names:
            return self._inner.read_rows(name, start, stop)
        weight_RH = self._inner.read_rows(self._source, start, stop).astype(np.float32)
        amax_R = np.abs(weight_RH).max(axis=1)
        if not np.isfinite(amax_R).all():
            row = start + int(np.flatnonzero(~np.isfinite(amax_R))[0])
            what = f"row {row} holds values that are not finite"
            raise CheckpointError(Problem(self._source, what, fix="get the weights again"))
        if name == self.names[1]:
            scale_R: NDArray[np.float32] = amax_R / _LARGEST_CODE
            return scale_R
        is_zero_R = amax_R <= _ZERO_AMAX
        steps_R = np.where(is_zero_R, 0, _LARGEST_CODE / np.where(is_zero_R, 1, amax_R))
        codes_RH = np.rint(weight_RH * steps_R.astype(np.float32)[:, None]).clip(-128, 127)
        return codes_RH.astype(np.int8)
