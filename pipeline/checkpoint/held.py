"""What some ranks of a stage hold of a weight, and for which values of it they answer.

Several processes may convert one pipeline stage, each for some of its ranks. A process reads the rows
that its ranks hold. Norms, repeated KV heads and the like are held by ranks of several processes; each
value is nevertheless checked by one process only, so that their counts of lost values add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.parallel import CUT_AXES, Dim, Mapping, part


@dataclass(frozen=True)
class Held:
    """Stored elements of a weight, as one range for each dimension.

    Attributes:
        needed: the smallest ranges that hold everything that the ranks hold, without padding.
        checked: what these ranks answer for, within `needed`; None: nothing.
    """

    needed: tuple[range, ...]
    checked: tuple[range, ...] | None

    def checked_in(self, origin: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...] | None:
        """`checked` as slices of a block that starts at `origin`; None: nothing of it."""
        if self.checked is None:
            return None
        edges = zip(self.checked, origin, shape, strict=True)
        cuts = [
            slice(min(max(r.start - first, 0), size), min(max(r.stop - first, 0), size))
            for r, first, size in edges
        ]
        return None if any(cut.start >= cut.stop for cut in cuts) else tuple(cuts)


def held(dims: Sequence[Dim], holders: Sequence[Mapping], own: Sequence[Mapping]) -> Held:
    """What `own` hold of a weight.

    Args:
        dims: of the weight; at most one of them is cut.
        holders: every rank of the stage that holds a part of it, in rank order.
        own: consecutive ones of them.
    """
    first, number = holders.index(own[0]), len(own)
    needed, checked = [], []
    for dim in dims:
        parts = [part(dim, mapping) for mapping in own]
        hull = range(min(p.start for p in parts), max(p.stop for p in parts))
        # The rank before may hold the same repeated head.
        known = part(dim, holders[first - 1]).stop if first and dim.axis in CUT_AXES else 0
        needed.append(hull)
        checked.append(range(max(hull.start, known), hull.stop))
    if not any(dim.axis in CUT_AXES for dim in dims):
        # All of them hold all of it: they share out its rows; a single number goes to the first.
        if not dims:
            return Held((), None if first else ())
        size = dims[0].size
        ends = (size * rank // len(holders) for rank in (first, first + number))
        checked[0] = range(*ends)
    return Held(tuple(needed), tuple(checked))
