"""From documents to candidate windows: a bounded pool of documents, then packing or padding.

Shape suffixes: N tokens of the pool, C candidates, D documents.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PlanError, Problem
from pipeline.quant.data.documents import Document
from pipeline.quant.data.encoding import TextEncoder, encode_document

MIN_POOL_CHARS: Final = 4 << 20
CHARS_PER_TOKEN: Final = 32
"""The pool holds this many characters for each token that is asked for: about eight times enough."""


@dataclass(frozen=True)
class Candidates:
    """Windows that can be chosen, without prefix and padding.

    Attributes:
        pieces: int32 arrays of token ids; packed ones are views of one row and equally long.
        document_lengths_C: int64, tokens of the document in which each piece begins.
        lengths_D: int64, tokens of every document.
        num_tokens: of the whole pool, separators included.
        num_truncated: documents that were longer than a window and lost their end.
    """

    pieces: Sequence[NDArray[np.int32]]
    document_lengths_C: NDArray[np.int64]
    lengths_D: NDArray[np.int64]
    num_tokens: int
    num_truncated: int = 0


def pool_chars(num_samples: int, seq_len: int) -> int:
    """Characters of text from which the windows are chosen; the rest of a larger file is not encoded."""
    return max(MIN_POOL_CHARS, CHARS_PER_TOKEN * num_samples * seq_len)


def pool(documents: Iterable[Document], seed: int, max_chars: int) -> list[Document]:
    """A sample of about `max_chars` characters, or all when there are fewer; in their order.

    The documents with the smallest hashes of seed and place: the same ones whatever the file's format,
    without knowing beforehand how many there are, and never more than that in memory.
    """
    heap: list[tuple[int, int, Document]] = []
    total = 0
    for index, document in enumerate(documents):
        heapq.heappush(heap, (-_rank(seed, index), index, document))
        total += len(document.content)
        while total - len(heap[0][2].content) >= max_chars:
            total -= len(heapq.heappop(heap)[2].content)
    return [document for _, _, document in sorted(heap, key=lambda entry: entry[1])]


def _rank(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:document:{index}".encode()).digest()
    return int.from_bytes(digest[:16], "big")


def packed(documents: Iterable[Document], encoder: TextEncoder, piece_len: int) -> Candidates:
    """Documents joined by the separator, cut without overlap; a remainder fills no piece and is lost."""
    separator = np.asarray(encoder.separator, np.int32)
    rows: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for ids_N in _encoded(documents, encoder):
        lengths.append(len(ids_N))
        rows.append(np.concatenate([ids_N, separator]))
    stream_N = np.concatenate([*rows, np.empty(0, np.int32)])
    num_pieces = len(stream_N) // piece_len
    ends_D = np.cumsum([len(row) for row in rows], dtype=np.int64)
    starts_C = np.arange(num_pieces, dtype=np.int64) * piece_len
    lengths_D = np.asarray(lengths, np.int64)
    begins_in_C = np.searchsorted(ends_D, starts_C, side="right")
    return Candidates(
        pieces=list(stream_N[: num_pieces * piece_len].reshape(num_pieces, piece_len)),
        document_lengths_C=lengths_D[begins_in_C],
        lengths_D=lengths_D,
        num_tokens=len(stream_N),
    )


def one_per_document(
    documents: Iterable[Document], encoder: TextEncoder, piece_len: int
) -> Candidates:
    """The beginning of every document, each by itself."""
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for ids_N in _encoded(documents, encoder):
        if len(ids_N):
            lengths.append(len(ids_N))
            pieces.append(ids_N[:piece_len])
    lengths_D = np.asarray(lengths, np.int64)
    return Candidates(
        pieces=pieces,
        document_lengths_C=lengths_D,
        lengths_D=lengths_D,
        num_tokens=int(lengths_D.sum()),
        num_truncated=int((lengths_D > piece_len).sum()),
    )


def _encoded(documents: Iterable[Document], encoder: TextEncoder) -> Iterator[NDArray[np.int32]]:
    """Every document; those that the chat template refuses are listed at the end, all at once."""
    problems: list[Problem] = []
    for document in documents:
        ids = _ids_or_problems(document, encoder)
        if isinstance(ids, PlanError):
            problems += ids.problems
        else:
            yield np.asarray(ids, np.int32)
    if problems:
        raise PlanError(_few(problems))


def _ids_or_problems(document: Document, encoder: TextEncoder) -> list[int] | PlanError:
    try:
        return encode_document(document, encoder)
    except PlanError as error:
        return error


def _few(problems: list[Problem], most: int = 5) -> list[Problem]:
    if len(problems) <= most:
        return problems
    where = problems[0].where.rpartition(":")[0]
    return [*problems[:most], Problem(where, f"{len(problems) - most} more dialogues are wrong")]


def room_for_text(encoder: TextEncoder, seq_len: int, what: str) -> int:
    """Tokens of a window beside its prefix.

    Raises:
        PlanError: there is no room.
    """
    piece_len = seq_len - len(encoder.prefix)
    if piece_len < 1:
        raise PlanError(
            Problem(
                what,
                f"seq_len {seq_len} has no room for text after {len(encoder.prefix)} prefix token(s)",
                allowed=f"at least {len(encoder.prefix) + 1}",
            )
        )
    return piece_len
