"""Sampling against a slow, plain formulation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.runtime.sampling import Sampler, SamplingOptions, top_k_ids, top_p_indices

scores = arrays(np.float64, st.integers(1, 60), elements=st.floats(-30, 30, width=32))


@given(scores, st.integers(1, 70))
def test_top_k_is_the_head_of_a_stable_sort(score_list: np.ndarray, top_k: int) -> None:
    expected = sorted(sorted(range(len(score_list)), key=lambda i: (-score_list[i], i))[:top_k])
    assert top_k_ids(score_list, top_k).tolist() == expected


@given(scores, st.floats(0.001, 0.999))
def test_top_p_set_is_sufficient_and_smallest(score_list: np.ndarray, top_p: float) -> None:
    probabilities = np.exp(score_list - score_list.max())
    probabilities /= probabilities.sum()
    kept = top_p_indices(probabilities, top_p)
    assert sorted(set(kept.tolist())) == kept.tolist()
    assert probabilities[kept].sum() >= top_p - 1e-9
    least = probabilities[kept].min()
    assert (
        probabilities[kept].sum() - least < top_p + 1e-9
    )  # without its least member it is too small
    left_out = np.delete(probabilities, kept)
    assert left_out.size == 0 or left_out.max() <= least


@given(
    scores, st.integers(0, 2**64 - 1), st.floats(1e-3, 100), st.integers(0, 70), st.floats(0.01, 1)
)
def test_a_draw_is_a_kept_token_and_repeats(
    score_list: np.ndarray, seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = score_list.astype(np.float32)
    options = SamplingOptions(temperature, top_k, top_p, seed)
    first, again = Sampler(options), Sampler(options)
    tokens = [first.choose(logits) for _ in range(4)]
    assert tokens == [again.choose(logits) for _ in range(4)]
    best = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert set(tokens) <= set(best[: top_k or None])


@given(scores, st.integers(0, 2**64 - 1), st.lists(st.integers(0, 3), max_size=6))
def test_the_stream_does_not_depend_on_other_requests(
    score_list: np.ndarray, seed: int, others: list[int]
) -> None:
    logits = score_list.astype(np.float32)
    options = SamplingOptions(temperature=1.0, seed=seed)
    alone, shared = Sampler(options), Sampler(options)
    neighbour = Sampler(SamplingOptions(temperature=1.0, seed=seed ^ 1))
    expected = [alone.choose(logits) for _ in others]
    actual = []
    for count in others:
        for _ in range(count):
            neighbour.choose(logits)
        actual.append(shared.choose(logits))
    assert actual == expected
