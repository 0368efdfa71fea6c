"""Streaming writer of one safetensors file, byte for byte as the safetensors library lays it out."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import LAYOUT_ORDER, NUMPY_DTYPES, num_bytes
from pipeline.errors import Problem, StageError

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written; `dtype` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return num_bytes(self.dtype, self.shape)


def file_bytes(specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None) -> int:
    """Exact size of the file that `SafetensorsWriter` makes of these tensors."""
    listed = list(specs)
    return _LENGTH_BYTES + len(_header(listed, metadata)) + sum(spec.nbytes for spec in listed)


def check_room(directory: Path, size: int) -> None:
    """Whether `size` bytes fit on the disk of `directory`.

    Raises:
        StageError: they do not; says how much is needed.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        raise StageError(_no_room(directory, size, free))


def _no_room(where: Path, size: int, free: int) -> Problem:
    what = f"needs {size} bytes, {free} are free on the disk"
    return Problem(str(where), what, fix="make room, or publish elsewhere")


class SafetensorsWriter:
    """Lays the file out from declared shapes, then takes tensors, whole or by rows, in any order.

    Use it as a context manager. The length of the header is written last, so a file that was never
    finished cannot be taken for a checkpoint; leaving by an exception removes it.
    """

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None
    ) -> None:
        """Creates the file, which must not exist, at its full size.

        Raises:
            StageError: not enough room on the disk; says how much is needed.
        """
        self._path = path
        ordered = _in_file_order(specs)
        self._specs = {spec.name: spec for spec in ordered}
        assert len(self._specs) == len(ordered), "a tensor is declared twice"
        header = _header(ordered, metadata)
        self._length = len(header).to_bytes(_LENGTH_BYTES, "little")
        self._offsets: dict[str, int] = {}
        position = _LENGTH_BYTES + len(header)
        for spec in ordered:
            self._offsets[spec.name] = position
            position += spec.nbytes
        self._size = position
        self._missing_bytes = {spec.name: spec.nbytes for spec in ordered}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._reserve(position)
            self._pwrite(memoryview(header), _LENGTH_BYTES)
        except BaseException:
            self._abandon()
            raise

    def write(self, name: str, values: npt.NDArray[Any]) -> None:
        """One whole tensor."""
        spec = self._specs[name]
        assert values.shape == spec.shape, (name, values.shape, spec.shape)
        self._put(spec, values, 0)

    def write_rows(self, name: str, first_row: int, values: npt.NDArray[Any]) -> None:
        """Rows from `first_row` on. Every row must be written exactly once.

        `values` may have fewer dimensions than the tensor; rows then count over all leading ones.
        """
        spec = self._specs[name]
        leading = len(spec.shape) - values.ndim + 1
        num_rows = math.prod(spec.shape[:leading])
        assert values.shape[1:] == spec.shape[leading:], (name, values.shape, spec.shape)
        assert 0 <= first_row <= num_rows - values.shape[0], (name, first_row, values.shape)
        self._put(spec, values, first_row * (spec.nbytes // max(num_rows, 1)))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            unwritten = {name: left for name, left in self._missing_bytes.items() if left}
            assert not unwritten, f"{self._path}: bytes not written: {unwritten}"
            self._pwrite(memoryview(self._length), 0)
        except BaseException:
            self._abandon()
            raise
        os.close(self._file)

    def _put(self, spec: TensorSpec, values: npt.NDArray[Any], offset: int) -> None:
        assert values.dtype == NUMPY_DTYPES[spec.dtype], (spec, values.dtype)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        assert self._missing_bytes[spec.name] >= data.nbytes, f"{spec.name} is written twice"
        self._missing_bytes[spec.name] -= data.nbytes
        self._pwrite(data.data, self._offsets[spec.name] + offset)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            # Room was reserved; some file systems take it back, and any disk can break.
            what = f"cannot be written: {error.strerror}; it needs {self._size} bytes in all"
            fix = "make room, or look at the disk"
            raise StageError(Problem(str(self._path), what, fix=fix)) from error

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self._path.parent).free
            raise StageError(_no_room(self._path, size, free)) from error

    def _abandon(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def _in_file_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (LAYOUT_ORDER[spec.dtype], spec.name))


def _header(specs: Iterable[TensorSpec], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for spec in _in_file_order(specs):
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
