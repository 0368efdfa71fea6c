"""Choosing one option for each group: the least loss that fits a budget of bits.

A multiple-choice knapsack, solved by dynamic programming over the bits above the smallest choice. Bits
are counted in units: their greatest common divisor where the table then stays small, which is exact;
else a fixed share of the span between smallest and largest choice, every size rounded up, so the
budget holds and the result is the best for sizes that differ by a millionth. The unit does not depend
on the budget: with a larger budget the loss is never higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_UNITS = 1 << 19
"""Of the whole span; the table holds one byte for each group and unit of the budget."""


@dataclass(frozen=True)
class Option:
    """One format of one group.

    Attributes:
        bits: what the group takes.
        loss: what is to be minimised in sum; finite, not negative.
    """

    bits: int
    loss: float


def pick(groups: Sequence[Sequence[Option]], budget_bits: int) -> list[int]:
    """The number of the chosen option of each group; equal losses are settled by fewer bits.

    Raises:
        ValueError: not even the smallest choice fits.
    """
    for options in groups:
        assert options, "a group without options"
        assert all(math.isfinite(one.loss) and one.loss >= 0 for one in options), options
    ordered = [sorted(range(len(g)), key=lambda i, g=g: (g[i].bits, g[i].loss)) for g in groups]  # type: ignore[misc]
    smallest = [group[order[0]].bits for group, order in zip(groups, ordered, strict=True)]
    spare = budget_bits - sum(smallest)
    if spare < 0:
        raise ValueError(f"{budget_bits} bits are fewer than the smallest choice, {sum(smallest)}")
    best = [
        min(order, key=lambda i, g=group: (g[i].loss, g[i].bits))  # type: ignore[misc]
        for group, order in zip(groups, ordered, strict=True)
    ]
    if sum(group[i].bits for group, i in zip(groups, best, strict=True)) <= budget_bits:
        return best  # also where units are rounded up
    extra = [
        [group[i].bits - least for i in order]
        for group, order, least in zip(groups, ordered, smallest, strict=True)
    ]
    unit = _unit(extra)
    table = [
        [(-(-bits // unit), groups[index][i].loss) for bits, i in zip(row, order, strict=True)]
        for index, (row, order) in enumerate(zip(extra, ordered, strict=True))
    ]
    return [ordered[index][place] for index, place in enumerate(_solve(table, int(spare // unit)))]


def _unit(extra: Sequence[Sequence[int]]) -> int:
    span = sum(max(row) for row in extra)
    divisor = math.gcd(*(bits for row in extra for bits in row))
    if span <= divisor * MAX_UNITS:
        return max(divisor, 1)
    return -(-span // MAX_UNITS)


def _solve(table: Sequence[Sequence[tuple[int, float]]], capacity: int) -> list[int]:
    """`table`: units and loss of each option, fewest units first."""
    least: NDArray[np.float64] = np.zeros(capacity + 1)
    choices = np.zeros((len(table), capacity + 1), np.uint8)
    for row, options in enumerate(table):
        found = np.full(capacity + 1, np.inf)
        for place, (units, loss) in enumerate(options):
            if units > capacity:
                continue
            total = least[: capacity + 1 - units] + loss
            better = total < found[units:]
            found[units:][better] = total[better]
            choices[row, units:][better] = place
        least = found
    picked = [0] * len(table)
    left = capacity
    for row in range(len(table) - 1, -1, -1):
        picked[row] = int(choices[row, left])
        left -= table[row][picked[row]][0]
    return picked
