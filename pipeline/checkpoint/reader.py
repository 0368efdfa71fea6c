"""Streaming reader of safetensors: one file, or a directory in Hugging Face layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.header import TensorInfo, read_header
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import CheckpointError, Problem

__all__ = ["BLOCK_BYTES", "CheckpointReader", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BLOCK_BYTES = 32 << 20
"""How much of a tensor is in memory at a time."""


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
            problems = _index_problems(path / INDEX_FILE, weight_map, self.tensors)
        if problems:
            raise CheckpointError(problems)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One whole tensor, in the dtype of the file (bfloat16 and float8 as ml_dtypes)."""
        tensor = self.tensors[name]
        return self._read(tensor, tensor.offset, tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) of dimension 0, nothing else is read."""
        tensor = self.tensors[name]
        assert 0 <= start <= stop <= tensor.shape[0], (name, start, stop)
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        return self._read(
            tensor, tensor.offset + start * row_bytes, (stop - start, *tensor.shape[1:])
        )

    def row_blocks(
        self, name: str, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The tensor as (first row, rows), each at most `block_bytes`, or one row if that is more."""
        tensor = self.tensors[name]
        num_rows = tensor.shape[0]
        row_bytes = max(tensor.nbytes // max(num_rows, 1), 1)
        step = max(block_bytes // row_bytes, 1)
        for start in range(0, num_rows, step):
            yield start, self.read_rows(name, start, min(start + step, num_rows))

    @staticmethod
    def _read(tensor: TensorInfo, offset: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        values = np.empty(shape, NUMPY_DTYPES[tensor.dtype])
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(offset)
            view = values.reshape(-1).view(np.uint8).data
            while view:
                count = file.readinto(view)
                if not count:
                    what = "the file ends inside the tensor: it changed since it was opened"
                    raise CheckpointError(Problem(f"{tensor.file}: {tensor.name}", what))
                view = view[count:]
        return values


def _files_of_directory(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and what the index says about them (None without an index)."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if not directory.is_dir():
        raise CheckpointError(Problem(str(directory), "no such directory"))
    if single.exists() and index.exists():
        what = f"both {SINGLE_FILE} and {INDEX_FILE}: which one is meant is not clear"
        raise CheckpointError(Problem(str(directory), what, fix="remove the one that is stale"))
    if single.exists():
        return [single], None
    if index.exists():
        weight_map = _read_index(index)
        return [directory / name for name in dict.fromkeys(weight_map.values())], weight_map
    what = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    fix = ""
    if any(directory.glob("*.bin")):
        fix = (
            "save the PyTorch .bin weights as safetensors: save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(Problem(str(directory), what, fix=fix))


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = parse_object(path.read_bytes()).get("weight_map")
    except OSError as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Problem(str(path), "no weight_map", '{"weight_map": {tensor: file}}'))
    problems = []
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            what = f"{name} is said to be in {file!r}"
            problems.append(Problem(str(path), what, "a .safetensors file name without a path"))
        elif not (path.parent / file).is_file():
            problems.append(Problem(str(path), f"{name} is said to be in {file}, which is missing"))
    if problems:
        raise CheckpointError(problems)
    return weight_map


def _is_plain_name(file: str) -> bool:
    """Whether it names a file of the same directory: an index must not read elsewhere."""
    return (
        PurePath(file).name == file
        and file.endswith(".safetensors")
        and file.isprintable()
        and len(file.encode()) <= 255
    )


def _index_problems(
    index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> list[Problem]:
    problems = []
    for name, file in weight_map.items():
        if name not in tensors:
            problems.append(Problem(str(index), f"{name} is said to be in {file}, which lacks it"))
        elif tensors[name].file.name != file:
            what = f"{name} is said to be in {file}, but is in {tensors[name].file.name}"
            problems.append(Problem(str(index), what))
    problems += [
        Problem(str(tensors[name].file), f"{name} is not in {index.name}")
        for name in tensors
        if name not in weight_map
    ]
    return problems
