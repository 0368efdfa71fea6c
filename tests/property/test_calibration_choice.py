"""Which windows are chosen: any text, any strategy; and what each strategy is for."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quant.data import Document
from pipeline.quant.data.candidates import Candidates, one_per_document, packed, pool
from pipeline.quant.data.strategies import (
    STRATEGIES,
    TAIL_SHARE,
    choose,
    mean_surprise,
    rare_tokens,
    token_counts,
)

PIECES = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=14)


class LetterEncoder:
    """One token per character; 0 begins a prompt, 1 separates documents."""

    prefix = (0,)
    separator = (1,)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def _candidates(pieces: list[list[int]]) -> Candidates:
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    arrays = [np.array(piece, np.int32) for piece in pieces]
    return Candidates(arrays, lengths, lengths, int(lengths.sum()))


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 3), data=st.data())
def test_every_strategy_gives_exactly_the_number_once_each_and_in_order(
    pieces: list[list[int]], seed: int, data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(pieces)))
    for strategy in STRATEGIES:
        chosen = choose(_candidates(pieces), number, strategy, seed)
        assert len(chosen) == number
        assert all(np.diff(chosen) > 0)
        assert set(chosen.tolist()) <= set(range(len(pieces)))
        assert np.array_equal(chosen, choose(_candidates(pieces), number, strategy, seed))


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 3))
def test_a_larger_choice_contains_the_smaller(pieces: list[list[int]], seed: int) -> None:
    """So adding samples never takes one away."""
    candidates = _candidates(pieces)
    for strategy in STRATEGIES:
        sets = [set(choose(candidates, n, strategy, seed).tolist()) for n in range(len(pieces) + 1)]
        assert all(small < large for small, large in itertools.pairwise(sets))


def test_the_choices_of_this_version() -> None:
    """Recorded: what changes a choice changes artifacts, and so the version of the stage."""
    pieces = [[(7 * a * a + 3 * b) % 23 for b in range(a % 5 + 2)] for a in range(12)]
    chosen = {name: choose(_candidates(pieces), 4, name, 0).tolist() for name in STRATEGIES}
    assert chosen == {
        "random": [4, 7, 9, 10],
        "diverse": [2, 4, 9, 11],
        "length": [4, 6, 7, 10],
        "perplexity": [1, 2, 6, 11],
    }


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES)
def test_rare_tokens_are_the_tail(pieces: list[list[int]]) -> None:
    counts = Counter(token for piece in pieces for token in piece)
    rare_V = rare_tokens(token_counts([np.array(piece, np.int32) for piece in pieces]))
    rare = set(np.flatnonzero(rare_V).tolist())
    assert rare
    assert rare <= set(counts)
    most = max(counts[token] for token in rare)
    assert {token for token, count in counts.items() if count <= most} == rare
    share = sum(counts[token] for token in rare) / counts.total()
    assert share <= TAIL_SHARE or most == min(counts.values())


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, seed=st.integers(0, 3))
def test_diverse_is_the_greedy_cover(pieces: list[list[int]], seed: int) -> None:
    """Against the plain algorithm: at every step, no other candidate has more that is new."""
    candidates = _candidates(pieces)
    rare_V = rare_tokens(token_counts(candidates.pieces))
    rare = [{token for token in piece if rare_V[token]} for piece in pieces]
    order = [int(choose(candidates, 1, "diverse", seed)[0])]
    for number in range(2, len(pieces) + 1):
        before = set(order)
        (new,) = set(choose(candidates, number, "diverse", seed).tolist()) - before
        order.append(new)
    covered: set[int] = set()
    for place, index in enumerate(order):
        left = order[place:]
        if not any(rare[other] - covered for other in left):
            covered = set()
        assert len(rare[index] - covered) == max(len(rare[other] - covered) for other in left)
        covered |= rare[index]


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES)
def test_surprise_is_that_of_the_other_pieces(pieces: list[list[int]]) -> None:
    """Against a model counted from scratch without the piece, in plain Python."""
    surprises = mean_surprise([np.array(piece, np.int32) for piece in pieces])
    size = max(map(max, pieces)) + 1
    for index, piece in enumerate(pieces):
        others = [other for place, other in enumerate(pieces) if place != index]
        singles = Counter(token for other in others for token in other)
        pairs = Counter(pair for other in others for pair in itertools.pairwise(other))
        firsts = Counter(token for other in others for token in other[:-1])
        bits = 0.0
        for first, second in itertools.pairwise(piece):
            of_pair = pairs[first, second] / firsts[first] if firsts[first] else 0.0
            of_token = (singles[second] + 1) / (singles.total() + size)
            bits -= math.log2(of_pair / 2 + of_token / 2)
        expected = 1024 * bits / max(1, len(piece) - 1)
        assert expected - 2 <= surprises[index] <= expected + 1  # rounded per token, then down


def test_length_takes_from_every_class_alike() -> None:
    pieces = [[1]] * 50 + [[1] * 9] * 3 + [[1] * 40]
    chosen = choose(_candidates(pieces), 9, "length", 0)
    lengths = Counter(len(pieces[index]) for index in chosen)
    assert lengths == {1: 5, 9: 3, 40: 1}


def test_perplexity_takes_what_the_rest_does_not_foretell() -> None:
    pieces = [[1, 2, 3, 4, 1, 2, 3, 4]] * 6 + [[4, 3, 9, 1, 8, 2, 7, 7]]
    assert choose(_candidates(pieces), 1, "perplexity", 0).tolist() == [6]


TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", min_codepoint=2), max_size=30), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 3), max_chars=st.integers(1, 120))
def test_the_pool_is_bounded_ordered_and_large_enough(
    texts: list[str], seed: int, max_chars: int
) -> None:
    documents = [Document(str(index), text=text) for index, text in enumerate(texts)]
    chosen = pool(iter(documents), seed, max_chars)
    places = [int(each.where) for each in chosen]
    assert places == sorted(set(places))
    total, everything = sum(len(each.text) for each in chosen), sum(map(len, texts))
    assert total >= min(max_chars, everything)
    assert total <= max_chars + max(map(len, texts))
    if everything < max_chars:
        assert chosen == documents


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, piece_len=st.integers(1, 9))
def test_documents_of_packed_and_padded_pieces(texts: list[str], piece_len: int) -> None:
    documents = [Document("", text=text) for text in texts]
    row = [token for text in texts for token in [*map(ord, text), 1]]
    lengths = [len(text) for text in texts for _ in range(len(text) + 1)]
    whole = packed(documents, LetterEncoder(), piece_len)
    assert [piece.tolist() for piece in whole.pieces] == [
        row[at : at + piece_len] for at in range(0, len(row) - piece_len + 1, piece_len)
    ]
    assert whole.document_lengths_C.tolist() == lengths[::piece_len][: len(whole.pieces)]
    single = one_per_document(documents, LetterEncoder(), piece_len)
    filled = [text for text in texts if text]
    assert [piece.tolist() for piece in single.pieces] == [
        [*map(ord, text)][:piece_len] for text in filled
    ]
    assert single.num_truncated == sum(len(text) > piece_len for text in filled)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_matters_where_something_is_open(strategy: str) -> None:
    pieces = [[1, 2, 3]] * 30  # all alike: only the seed can tell them apart
    first, second = (choose(_candidates(pieces), 5, strategy, seed).tolist() for seed in (0, 1))
    assert first != second
