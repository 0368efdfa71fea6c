"""The header of one safetensors file, validated to the byte.

Layout: u64 little-endian header length, that many bytes of JSON, then tensor data without gaps.
https://huggingface.co/docs/safetensors (format section)
"""

from __future__ import annotations

import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.checkpoint.dtypes import NUMPY_DTYPES, num_bytes
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import Problem

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_LENGTH = struct.Struct("<Q")
_short = reprlib.Repr().repr


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: safetensors name, for example "F16".
        offset: of the first byte, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(path: Path) -> tuple[list[TensorInfo], list[Problem]]:
    """Tensors of one file in file order, or what is wrong with it (then the list may be incomplete)."""
    where = str(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH.size)
            if len(prefix) < _LENGTH.size:
                return [], [Problem(where, f"{size} bytes: too short for a safetensors file")]
            (length,) = _LENGTH.unpack(prefix)
            if length > min(size - _LENGTH.size, MAX_HEADER_BYTES):
                what = (
                    f"the header claims {length} bytes, the file has {size}: truncated or corrupt"
                )
                return [], [Problem(where, what)]
            if length == 0:
                return [], [Problem(where, "an empty header: the file was never finished")]
            data = file.read(length)
    except OSError as error:
        return [], [Problem(where, f"cannot be read: {error.strerror}")]
    try:
        entries = parse_object(data)
    except ValueError as error:
        return [], [Problem(where, f"the header is not valid JSON: {error}")]
    return _tensors(entries, path, first=_LENGTH.size + length, size=size)


def _tensors(
    entries: dict[str, Any], path: Path, first: int, size: int
) -> tuple[list[TensorInfo], list[Problem]]:
    tensors: list[TensorInfo] = []
    problems: list[Problem] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            if not _is_metadata(entry):
                problems.append(Problem(f"{path}: {name}", _short(entry), "text for each key"))
            continue
        info = _tensor(name, entry, path, first)
        if isinstance(info, Problem):
            problems.append(info)
        else:
            tensors.append(info)
    # Empty tensors share an offset with their successor: order them before it.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    if not problems:
        problems = _gap_problems(tensors, path, first, size)
    return tensors, problems


def _tensor(name: str, entry: object, path: Path, first: int) -> TensorInfo | Problem:
    where = f"{path}: {name}"
    if not name.isprintable():
        return Problem(str(path), f"{name!a} is not a tensor name", "printable text")
    if not isinstance(entry, dict):
        return Problem(where, f"its header entry is {_short(entry)}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        return Problem(where, f"dtype {_short(dtype)}", ", ".join(NUMPY_DTYPES))
    if not _are_naturals(shape):
        return Problem(where, f"shape {_short(shape)}", "a list of integers, 0 or more")
    if not _are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return Problem(where, f"data_offsets {_short(offsets)}", "[begin, end] with begin <= end")
    nbytes = num_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != nbytes:
        what = f"{dtype} {shape} needs {nbytes} bytes, data_offsets {offsets} have "
        return Problem(where, what + str(offsets[1] - offsets[0]))
    return TensorInfo(name, dtype, tuple(shape), nbytes, path, first + offsets[0])


def _is_metadata(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _gap_problems(tensors: list[TensorInfo], path: Path, first: int, size: int) -> list[Problem]:
    position = first
    for tensor in tensors:
        where = f"{path}: {tensor.name}"
        if tensor.offset < position:
            return [Problem(where, "its data overlaps the tensor before it: the header is corrupt")]
        if tensor.offset > position:
            what = f"{tensor.offset - position} bytes before its data belong to no tensor"
            return [Problem(where, what)]
        position += tensor.nbytes
    if position > size:
        what = f"the tensors need {position} bytes, the file has {size}: truncated"
        return [Problem(str(path), what, fix="copy or download the file again")]
    if position < size:
        return [Problem(str(path), f"{size - position} bytes at the end belong to no tensor")]
    return []
