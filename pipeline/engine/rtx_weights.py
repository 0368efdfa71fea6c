"""Finds checkpoint tensors byte for byte in the weight chunk of a plan, in one pass over the file.

The plan does not say where a tensor lies. Every form of a tensor is known by one eight-byte word near
its start; the chunk is read once, every sixteenth byte is looked up among these words, and a hit is
compared in full. Only what is not found that way is searched for at every byte.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.engine.rtx_expected import Form
from pipeline.engine.rtx_plan import Chunk
from pipeline.errors import GateError, Problem

_STEP = 16  # observed alignment of tensors within the chunk
_WORD = 8
_HEAD_BYTES = 4096
_READ_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class WeightProof:
    """How many tensors were found, and how many bytes of the chunk they cover."""

    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class _Sought:
    """A form, its first bytes, and the word it is looked up by (at `word_offset` in these bytes)."""

    form: Form
    head: bytes
    word_offset: int

    @property
    def word(self) -> int:
        return int.from_bytes(self.head[self.word_offset :][:_WORD], "little")


def prove_weights(path: Path, chunk: Chunk, forms: Iterable[Form]) -> WeightProof:
    """Check that every tensor of `forms` lies in `chunk` in one of its forms.

    Raises:
        GateError: every tensor that does not.
    """
    sought = [_seek(form) for form in forms]
    names = {name for item in sought for name in item.form.tensors}
    proven: dict[str, int] = {}
    spans: dict[int, int] = {}
    with path.open("rb") as file:
        for item, offset in _aligned_hits(file, chunk, sought):
            _try(file, chunk, item, offset, proven, spans)
        for item in sought:
            if not all(name in proven for name in item.form.tensors):
                for offset in _unaligned_hits(file, chunk, item):
                    if _try(file, chunk, item, offset, proven, spans):
                        break
    missing = sorted(names - proven.keys())
    if missing:
        what = "is not in the engine's weights byte for byte"
        raise GateError([Problem(f"{path}: {name}", what, fix="build again") for name in missing])
    return WeightProof(num_tensors=len(names), num_bytes=sum(spans.values()))


def _seek(form: Form) -> _Sought:
    """Chooses the word with most distinct bytes, because words of zeros or ones are everywhere."""
    first = np.ascontiguousarray(next(form.blocks()))
    head = first.reshape(-1).view(np.uint8)[:_HEAD_BYTES].tobytes()
    offsets = range(0, max(1, len(head) - _WORD + 1), _STEP)
    best = max(offsets, key=lambda offset: len(set(head[offset : offset + _WORD])))
    return _Sought(form, head, best)


def _try(
    file: BinaryIO,
    chunk: Chunk,
    item: _Sought,
    offset: int,
    proven: dict[str, int],
    spans: dict[int, int],
) -> bool:
    """Compare a form with the chunk at `offset`; note its tensors if it is there."""
    if all(name in proven for name in item.form.tensors):
        return False
    nbytes = _length_if_equal(file, chunk, item, offset)
    if nbytes is None:
        return False
    proven.update(dict.fromkeys(item.form.tensors, offset))
    spans[offset] = nbytes
    return True


def _length_if_equal(file: BinaryIO, chunk: Chunk, item: _Sought, offset: int) -> int | None:
    if offset < 0:  # it would have to start before the chunk
        return None
    file.seek(chunk.offset + offset)
    if file.read(len(item.head)) != item.head:
        return None
    file.seek(chunk.offset + offset)
    nbytes = 0
    for block in item.form.blocks():
        data = np.ascontiguousarray(block).data.cast("B")
        nbytes += len(data)
        if offset + nbytes > chunk.nbytes or file.read(len(data)) != data:
            return None
    return nbytes


def _aligned_hits(
    file: BinaryIO, chunk: Chunk, sought: list[_Sought]
) -> Iterator[tuple[_Sought, int]]:
    """(form, offset in the chunk where it would start) for every word found at a multiple of _STEP."""
    by_word: dict[int, list[_Sought]] = {}
    for item in sought:
        by_word.setdefault(item.word, []).append(item)
    words = np.array(sorted(by_word), dtype=np.uint64)
    for start in range(0, chunk.nbytes, _READ_BYTES):
        file.seek(chunk.offset + start)
        data = file.read(min(_READ_BYTES, chunk.nbytes - start))
        for position, word in _known_words(data, words):
            for item in by_word[word]:
                yield item, start + position - item.word_offset


def _known_words(data: bytes, words: npt.NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """(position, word) of every known word at a multiple of _STEP in `data`."""
    usable = data[: len(data) // _WORD * _WORD]
    column = np.frombuffer(usable, np.uint64)[:: _STEP // _WORD]
    # A table over the low bits drops nearly everything before the exact look-up.
    may_be = np.zeros(1 << 16, bool)
    may_be[words & np.uint64(0xFFFF)] = True
    candidates = np.flatnonzero(may_be[column & np.uint64(0xFFFF)])
    exact = candidates[np.isin(column[candidates], words)]
    for index in exact.tolist():
        yield index * _STEP, int(column[index])


def _unaligned_hits(file: BinaryIO, chunk: Chunk, item: _Sought) -> Iterator[int]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        end = chunk.offset + chunk.nbytes
        found = mapped.find(item.head, chunk.offset, end)
        while found >= 0:
            yield found - chunk.offset
            found = mapped.find(item.head, found + 1, end)
