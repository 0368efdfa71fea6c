"""Choosing options under a budget: the true optimum, never above the budget, better with more bits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.quant.sensitivity import pick as module
from pipeline.quant.sensitivity.pick import Option, pick

# Sums of such losses are exact, so an equal optimum is equal to the last bit.
OPTION = st.builds(
    Option, bits=st.integers(1, 40), loss=st.integers(0, 64).map(lambda value: value / 64)
)
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def sums(groups: list[list[Option]], picked: list[int]) -> tuple[int, float]:
    chosen = [group[index] for group, index in zip(groups, picked, strict=True)]
    return sum(one.bits for one in chosen), sum(one.loss for one in chosen)


def smallest(groups: list[list[Option]]) -> int:
    return sum(min(one.bits for one in group) for group in groups)


def best_by_trying_all(groups: list[list[Option]], budget: int) -> float:
    totals = (
        sums(groups, list(one)) for one in itertools.product(*(range(len(g)) for g in groups))
    )
    return min(loss for bits, loss in totals if bits <= budget)


@given(GROUPS, st.integers(0, 120))
def test_no_other_choice_is_better(groups: list[list[Option]], spare: int) -> None:
    budget = smallest(groups) + spare
    bits, loss = sums(groups, pick(groups, budget))
    assert bits <= budget
    assert loss == best_by_trying_all(groups, budget)


@given(GROUPS, st.integers(0, 100), st.integers(0, 100))
def test_more_bits_are_never_worse(groups: list[list[Option]], spare: int, more: int) -> None:
    budget = smallest(groups) + spare
    few, many = (sums(groups, pick(groups, bits))[1] for bits in (budget, budget + more))
    assert many <= few


@given(GROUPS, st.integers(0, 100), st.integers(0, 100))
def test_rounded_sizes_keep_the_budget_and_the_order(
    groups: list[list[Option]], spare: int, more: int
) -> None:
    """As in a large model, where not every sum of sizes has a row in the table."""
    budget = smallest(groups) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_UNITS", 7)
        bits, few = sums(groups, pick(groups, budget))
        many = sums(groups, pick(groups, budget + more))[1]
    assert bits <= budget
    assert many <= few


@given(GROUPS)
def test_a_budget_below_the_smallest_choice_is_refused(groups: list[list[Option]]) -> None:
    with pytest.raises(ValueError, match="fewer than the smallest choice"):
        pick(groups, smallest(groups) - 1)


def test_equal_losses_cost_no_bits() -> None:
    groups = [[Option(8, 0.5), Option(4, 0.5)], [Option(16, 0.0), Option(4, 1.0)]]
    assert pick(groups, 24) == [1, 0]


def test_a_large_model_is_chosen_for_in_one_table() -> None:
    """320 groups of odd sizes: the table is bounded, and close to what the bits allow."""
    groups = [
        [Option(1000003 + 4 * n, 1.0 + n % 7), Option(2000029 + 8 * n, 0.1), Option(4000037, 0.0)]
        for n in range(320)
    ]
    budget = int(1.1 * smallest(groups))
    bits, loss = sums(groups, pick(groups, budget))
    # The bits are enough for 32 of the worst groups to grow by one step; rounding may cost one.
    assert loss <= sum(group[0].loss for group in groups) - 31 * (7.0 - 0.1) + 1e-6
    assert 0.995 * budget <= bits <= budget  # seen: 0.997
