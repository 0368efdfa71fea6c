"""The header of a TensorRT-RTX plan: what it says about its version, target and size.

Layout observed with TensorRT-RTX 1.7.1 (not documented; little endian): "vtrt" at 0, u64 file size
at 16, four version bytes at 24, "vtrt" at 28, u32 mask of compute capabilities at 32, and from 64
on a table of chunks, each u32 tag, u32 zero, u64 offset, u64 size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import GateError, Problem

SM_BITS = {75: 1, 80: 2, 86: 4, 89: 8, 120: 16, 121: 32}

_MAGIC = b"vtrt"
_HEADER = struct.Struct("<4s12xQ4s4sI28x")
_CHUNK = struct.Struct("<4s4xQQ")
_HEADER_BYTES = 64
_ENGINE_TAG, _WEIGHTS_TAG = b"NGNE", b"THGW"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A part of the plan file: first byte and length."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlanHeader:
    """A checked header."""

    file_bytes: int
    version: str
    sms: tuple[int, ...]
    engine: Chunk
    weights: Chunk


def read_header(path: Path) -> PlanHeader:
    """Parse the header and check that the chunks lie within the file.

    Raises:
        GateError: not a plan, or truncated.
    """
    where = str(path)
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES + 2 * _CHUNK.size)
    if len(head) < _HEADER_BYTES + 2 * _CHUNK.size or head[:4] != _MAGIC:
        raise GateError(Problem(where, "is not a TensorRT-RTX plan", fix="build again"))
    _, stated_bytes, version, magic, mask = _HEADER.unpack_from(head)
    if stated_bytes != file_bytes:
        what = f"has {file_bytes} bytes, its header says {stated_bytes}: truncated or damaged"
        raise GateError(Problem(where, what, fix="build again"))
    tags, chunks = [], []
    for index in range(2):
        tag, offset, nbytes = _CHUNK.unpack_from(head, _HEADER_BYTES + index * _CHUNK.size)
        tags.append(tag)
        chunks.append(Chunk(offset, nbytes))
    inside = all(chunk.offset + chunk.nbytes <= file_bytes for chunk in chunks)
    if magic != _MAGIC or tags != [_ENGINE_TAG, _WEIGHTS_TAG] or not inside:
        fix = "build again; if it stays, this TensorRT-RTX version is not known: use 1.7.1"
        raise GateError(Problem(where, "has a header of an unknown form", fix=fix))
    return PlanHeader(
        file_bytes=file_bytes,
        version=".".join(str(byte) for byte in version),
        sms=tuple(sm for sm, bit in SM_BITS.items() if mask & bit),
        engine=chunks[0],
        weights=chunks[1],
    )


def chunk_sha256(path: Path, chunk: Chunk) -> str:
    """sha256 of a part of the plan as 64 hexadecimal digits.

    The weights' is the same for every build of the same network, checkpoint and compiler; the code
    beside them differs in a few bytes from one build to the next.
    """
    digest, left = hashlib.sha256(), chunk.nbytes
    with path.open("rb") as file:
        file.seek(chunk.offset)
        while left and (data := file.read(min(left, _READ_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def check_header(path: Path, version: str, sms: Collection[int]) -> PlanHeader:
    """The header of a plan that must have been built by `version` for exactly `sms`.

    Raises:
        GateError: as read_header; also another version or other targets.
    """
    header = read_header(path)
    problems = []
    if header.version != version:
        what = f"was built by TensorRT-RTX {header.version}"
        problems.append(Problem(str(path), what, version, "build again"))
    if set(header.sms) != set(sms):
        built = sm_names(header.sms) or "no known GPU"
        what = f"was built for {built}"
        problems.append(Problem(str(path), what, sm_names(sms), "build again"))
    if problems:
        raise GateError(problems)
    return header


def sm_names(sms: Collection[int]) -> str:
    """SM86, SM89."""
    return ", ".join(f"SM{sm}" for sm in sorted(sms))
