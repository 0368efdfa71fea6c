"""One file of raw tensors that ONNX graphs point into (ONNX external data)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.disk import not_written
from pipeline.errors import StageError

# Page size: each tensor can be mapped by itself.
ALIGNMENT = 4096

_BITS = {"float32": 32, "float16": 16, "int8": 8, "float8e4m3fn": 8, "int4": 4}


@dataclass(frozen=True)
class WeightRef:
    """A tensor in the weights file.

    Attributes:
        name: as in the TensorRT-LLM checkpoint where it comes from there.
        dtype: "float32", "float16", "int8", "float8e4m3fn" or "int4" (two per byte, low nibble first,
            along the last axis).
        shape: logical shape.
        offset: first byte in the file.
        nbytes: bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def first_rows(self, num_rows: int) -> WeightRef:
        """The same bytes, cut after `num_rows` of the first axis."""
        assert 0 < num_rows <= self.shape[0], (num_rows, self)
        shape = (num_rows, *self.shape[1:])
        return WeightRef(self.name, self.dtype, shape, self.offset, _nbytes(self.dtype, shape))


class WeightsFile:
    """Writes tensors one after the other; each starts at a multiple of ALIGNMENT.

    Raises:
        StageError: the file exists, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: RawIOBase | None = None
        self._end = 0

    def __enter__(self) -> WeightsFile:
        with writing(self.path):
            # Unbuffered: a full disk is noticed by the write that meets it, not when closing.
            self._file = self.path.open("xb", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], blocks: Iterable[npt.NDArray[Any]]
    ) -> WeightRef:
        """Append a tensor given as consecutive C-ordered blocks; int4 blocks are packed bytes."""
        self._write(bytes(-self._end % ALIGNMENT))
        offset = self._end
        for block in blocks:
            self._write(np.ascontiguousarray(block).data.cast("B"))
        stored = WeightRef(name, dtype, shape, offset, _nbytes(dtype, shape))
        assert self._end - offset == stored.nbytes, (name, self._end, stored)
        return stored

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None, "used outside its with block"
        rest = memoryview(data)
        with writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._end += len(data)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns failures of the file system into errors that name the file.

    Raises:
        StageError: what the system said.
    """
    try:
        yield
    except OSError as error:
        raise StageError(not_written(path, error)) from error


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = math.prod(shape) * _BITS[dtype]
    assert bits % 8 == 0, (dtype, shape)
    return bits // 8
