"""What convert asks of a checkpoint's tensors, whether files hold them so or they are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.header import TensorInfo

Array = npt.NDArray[Any]

BLOCK_BYTES = 2 << 20
"""How much of a tensor is in memory at a time."""


class TensorReader(Protocol):
    """Tensors by name; data is read only when asked."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order in which it is best read."""

    def read(self, name: str) -> Array:
        """One whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of dimension 0."""

    def read_columns(self, name: str, start: int, stop: int) -> Array:
        """Columns [start, stop) of a matrix, as rows of the result."""

    def row_blocks(
        self, name: str, block_bytes: int = BLOCK_BYTES, within: range | None = None
    ) -> Iterator[tuple[int, Array]]:
        """The tensor as (first row, rows), each at most `block_bytes`, or one row if that is more.

        Args:
            within: of these rows only; None: of all.
        """


class RowReader(ABC):
    """A TensorReader that only has to say how it reads rows."""

    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of dimension 0."""

    def read(self, name: str) -> Array:
        """One whole tensor."""
        shape = self.tensors[name].shape
        if not shape:
            return self.read_rows(name, 0, 1).reshape(())
        return self.read_rows(name, 0, shape[0])

    def read_columns(self, name: str, start: int, stop: int) -> Array:
        """Columns [start, stop) of a matrix, as rows of the result; passes over the whole tensor."""
        return np.concatenate(
            [contiguous(rows[:, start:stop].T) for _, rows in self.row_blocks(name)], axis=1
        )

    def row_blocks(
        self, name: str, block_bytes: int = BLOCK_BYTES, within: range | None = None
    ) -> Iterator[tuple[int, Array]]:
        """See TensorReader."""
        for start, stop in row_ranges(self.tensors[name], block_bytes, within):
            yield start, self.read_rows(name, start, stop)


def row_ranges(
    tensor: TensorInfo, block_bytes: int, within: range | None = None
) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of blocks of a tensor, as `TensorReader.row_blocks` says."""
    num_rows = tensor.shape[0]
    rows = range(num_rows) if within is None else within
    assert 0 <= rows.start <= rows.stop <= num_rows, (tensor, rows)
    step = max(block_bytes // max(tensor.nbytes // max(num_rows, 1), 1), 1)
    for start in range(rows.start, rows.stop, step):
        yield start, min(start + step, rows.stop)


def contiguous(values: Array) -> Array:
    """C-ordered, for callers that look at the bytes."""
    return np.ascontiguousarray(values)
