"""Which candidates are taken. Every choice is a pure function of the candidates and the seed.

No random generator and no comparison of sums of floats decides anything: their streams and their last
bits may change with the version of a library, and with them every artifact that was calibrated on them.
Ties are broken by a hash of seed and place.

Shape suffixes: C candidates, V vocabulary, N tokens of all candidates.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.quant.data.candidates import Candidates

TAIL_SHARE: Final = 0.05
"""Rare tokens: the least frequent ids that together make up at most this share of a text's tokens."""

_BITS: Final = 1024
"""Fixed-point steps of one bit of surprise."""


def choose(candidates: Candidates, num_chosen: int, strategy: str, seed: int) -> NDArray[np.int64]:
    """Indices of the chosen candidates, increasing, each once; exactly `num_chosen` of them.

    Args:
        strategy: "random": those with the smallest hashes. "diverse": greedily, each one the candidate
            with the most rare tokens that no earlier one had; when all are covered, again from the
            start. "length": as many from every class of document length (a class for each power of
            two), so far as it has them. "perplexity": the hardest for a model of token pairs that is
            counted on all other candidates; it knows nothing of meaning, and noise is hard, too.
    """
    assert 0 <= num_chosen <= len(candidates.pieces)
    ordered = STRATEGIES[strategy](candidates, num_chosen, by_hash(len(candidates.pieces), seed))
    return np.asarray(sorted(ordered[:num_chosen]), np.int64)


def by_hash(number: int, seed: int) -> list[int]:
    """0 ... number - 1 in the order of a hash with the seed."""
    return sorted(
        range(number), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )


def _random(_: Candidates, __: int, order: list[int]) -> list[int]:
    return order


def _diverse(candidates: Candidates, num_chosen: int, order: list[int]) -> list[int]:
    """Lazy greedy cover: a gain only falls as more is covered, so an old one is an upper bound."""
    is_rare_V = rare_tokens(token_counts(candidates.pieces))
    rare = [set(np.unique(piece[is_rare_V[piece]]).tolist()) for piece in candidates.pieces]
    place = {index: rank for rank, index in enumerate(order)}
    chosen: list[int] = []
    left = set(order)
    while len(chosen) < num_chosen:
        heap = [(-len(rare[index]), place[index]) for index in left if rare[index]]
        if not heap:  # only candidates without a single rare token
            return chosen + [index for index in order if index in left]
        heapq.heapify(heap)
        covered: set[int] = set()
        while heap and len(chosen) < num_chosen:
            _, rank = heapq.heappop(heap)
            index = order[rank]
            gain = len(rare[index] - covered)
            if gain and heap and (-gain, rank) > heap[0]:
                heapq.heappush(heap, (-gain, rank))
            elif gain:
                covered |= rare[index]
                chosen.append(index)
                left.remove(index)
    return chosen


def _length(candidates: Candidates, num_chosen: int, order: list[int]) -> list[int]:
    classes: dict[int, list[int]] = {}
    for index in order:
        length = int(candidates.document_lengths_C[index])
        classes.setdefault(length.bit_length(), []).append(index)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < num_chosen:
        chosen += [members[turn] for _, members in sorted(classes.items()) if turn < len(members)]
        turn += 1
    return chosen


def _perplexity(candidates: Candidates, _: int, order: list[int]) -> list[int]:
    place = {index: rank for rank, index in enumerate(order)}
    surprise_C = mean_surprise(candidates.pieces)
    return sorted(order, key=lambda index: (-surprise_C[index], place[index]))


STRATEGIES: Final[dict[str, Callable[[Candidates, int, list[int]], list[int]]]] = {
    "random": _random,
    "diverse": _diverse,
    "length": _length,
    "perplexity": _perplexity,
}


def token_counts(pieces: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """int64 [V]: how often each id occurs; V is the highest id plus one."""
    counts_V = np.zeros(0, np.int64)
    for piece in pieces:
        counts = np.bincount(piece, minlength=len(counts_V)).astype(np.int64)
        counts[: len(counts_V)] += counts_V
        counts_V = counts
    return counts_V


def rare_tokens(counts_V: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [V]: the ids that occur, and are in the tail of the counts (see TAIL_SHARE).

    Ids that occur equally often are all rare, or none of them is. The least frequent ones always are,
    though in a short text they may make up more than TAIL_SHARE.
    """
    counts, numbers = np.unique(counts_V[counts_V > 0], return_counts=True)
    if not len(counts):
        return np.zeros(len(counts_V), bool)
    inside = (counts * numbers).cumsum() <= TAIL_SHARE * (counts * numbers).sum()
    limit = counts[max(int(inside.sum()) - 1, 0)]
    is_rare_V: NDArray[np.bool_] = (counts_V > 0) & (counts_V <= limit)
    return is_rare_V


def mean_surprise(pieces: Sequence[NDArray[np.int32]]) -> list[int]:
    """For each piece, its mean surprise per token in 1/1024 bit, under the counts of all the others.

    Half the probability is that of the pair of tokens, half that of the token alone, plus one.
    """
    counts_V = token_counts(pieces)
    size = len(counts_V)
    pairs = np.concatenate([_pairs(piece, size) for piece in pieces] or [np.empty(0, np.int64)])
    known, known_counts = np.unique(pairs, return_counts=True)
    firsts_V = np.bincount(known // max(size, 1), known_counts, minlength=size).astype(np.int64)
    total = int(counts_V.sum())
    return [_surprise(piece, counts_V, firsts_V, (known, known_counts), total) for piece in pieces]


def _pairs(piece: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    return piece[:-1].astype(np.int64) * size + piece[1:]


def _surprise(
    piece: NDArray[np.int32],
    counts_V: NDArray[np.int64],
    firsts_V: NDArray[np.int64],
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
    total: int,
) -> int:
    if len(piece) < 2:
        return 0
    size = len(counts_V)
    known, known_counts = pairs
    own_pairs, place, own_counts = np.unique(
        _pairs(piece, size), return_inverse=True, return_counts=True
    )
    other_pairs = known_counts[np.searchsorted(known, own_pairs)] - own_counts
    other_first = firsts_V[piece[:-1]] - _own_counts(piece[:-1], piece[:-1])
    other_second = counts_V[piece[1:]] - _own_counts(piece, piece[1:])
    of_pair = other_pairs[place.reshape(-1)] / np.maximum(other_first, 1)
    of_token = (other_second + 1) / (total - len(piece) + size)
    # Rounded to fixed point token by token: then the sum is exact, in whatever order it is made.
    bits = np.rint(-np.log2(0.5 * of_pair + 0.5 * of_token) * _BITS).astype(np.int64)
    return int(bits.sum()) // len(bits)


def _own_counts(piece: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each of `ids`, all of which occur in `piece`, occurs in it."""
    own, counts = np.unique(piece, return_counts=True)
    return counts[np.searchsorted(own, ids)]
