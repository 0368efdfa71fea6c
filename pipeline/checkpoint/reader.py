"""Streaming reader of safetensors: one file, or a directory in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.header import TensorInfo, read_header
from pipeline.checkpoint.index import check_index, weight_files, why_no_file
from pipeline.checkpoint.tensor_reader import row_ranges
from pipeline.errors import CheckpointError, Problem

__all__ = ["BLOCK_BYTES", "CheckpointReader", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK_BYTES = 2 << 20
"""How much of a tensor is in memory at a time: small enough to be checked and cut in the CPU's cache."""


class CheckpointReader:
    """Reads headers when it is made, and data only when asked.

    Attributes:
        tensors: every tensor by name, in the order in which the data lies in the files.
    """

    def __init__(self, path: Path) -> None:
        """Opens a directory in Hugging Face layout, or one .safetensors file.

        Raises:
            CheckpointError: nothing there, or every way in which files, headers and index are wrong.
        """
        files, weight_map = ([path], None) if path.is_file() else _files_of_directory(path)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        for file in files:
            tensors, wrong = read_header(file)
            problems += wrong
            for tensor in tensors:
                first = self.tensors.setdefault(tensor.name, tensor)
                if first is not tensor:
                    what = f"also in {first.file.name}: a tensor must be in one file only"
                    problems.append(Problem(f"{file}: {tensor.name}", what))
        if weight_map is not None and not problems:
            problems = check_index(path / INDEX_FILE, weight_map, self.tensors)
        if problems:
            raise CheckpointError(problems)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One whole tensor, in the dtype of the file (bfloat16 and float8 as ml_dtypes)."""
        tensor = self.tensors[name]
        with _opened(tensor, tensor.offset) as file:
            return self._read(file, tensor, tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of dimension 0, nothing else is read."""
        tensor = self.tensors[name]
        assert 0 <= start <= stop <= tensor.shape[0], (name, start, stop)
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        with _opened(tensor, tensor.offset + start * row_bytes) as file:
            return self._read(file, tensor, (stop - start, *tensor.shape[1:]))

    def read_columns(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Columns [start, stop) of a matrix, as rows of the result; passes over the whole tensor."""
        tensor = self.tensors[name]
        num_rows, num_columns = tensor.shape
        assert 0 <= start <= stop <= num_columns, (name, start, stop)
        columns = np.empty((stop - start, num_rows), NUMPY_DTYPES[tensor.dtype])
        for first_row, rows in self.row_blocks(name):
            columns[:, first_row : first_row + len(rows)] = rows[:, start:stop].T
        return columns

    def row_blocks(
        self, name: str, block_bytes: int = BLOCK_BYTES, within: range | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """See TensorReader."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        skipped = within.start * row_bytes if within else 0
        # One descriptor for all blocks: the kernel's read-ahead belongs to it.
        with _opened(tensor, tensor.offset + skipped) as file:
            for start, stop in row_ranges(tensor, block_bytes, within):
                yield start, self._read(file, tensor, (stop - start, *tensor.shape[1:]))

    @staticmethod
    def _read(file: FileIO, tensor: TensorInfo, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The next values of `file`, straight into a new array."""
        values = np.empty(shape, NUMPY_DTYPES[tensor.dtype])
        view = values.reshape(-1).view(np.uint8).data
        while view:
            count = file.readinto(view)
            if not count:
                what = "the file ends inside the tensor: it changed since it was opened"
                raise CheckpointError(Problem(f"{tensor.file}: {tensor.name}", what))
            view = view[count:]
        return values


def _opened(tensor: TensorInfo, offset: int) -> FileIO:
    file = FileIO(tensor.file)
    file.seek(offset)
    return file


def _files_of_directory(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and what the index says about them (None without an index)."""
    if not directory.is_dir():
        what = "no such directory"
        if directory.is_symlink():
            what = f"no directory, but {why_no_file(directory)}"
        raise CheckpointError(Problem(str(directory), what))
    for path in (directory / SINGLE_FILE, directory / INDEX_FILE):
        if path.is_symlink() and not path.is_file():
            raise CheckpointError(Problem(str(path), why_no_file(path)))
    return weight_files(directory, SINGLE_FILE, INDEX_FILE, (".safetensors",))
