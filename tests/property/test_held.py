"""However ranks are dealt out: each process reads what it needs, and every value is checked once."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.convert_processes import blocks_of_ranks
from pipeline.checkpoint.held import held
from pipeline.parallel import Axis, Dim, Extent, Mapping, mappings, part, why_not

TP = st.sampled_from([1, 2, 3, 4, 6, 8])
CUT = [Axis.Q, Axis.KV, Axis.FFN, Axis.VOCAB, Axis.EXPERT_FFN]


@st.composite
def weights(draw: st.DrawFn, tp: int) -> tuple[Dim, ...]:
    """A number, a vector or a matrix of which at most one dimension is cut."""
    whole = Dim(Axis.HIDDEN, Extent(draw(st.integers(1, 12))))
    axis = draw(st.sampled_from(CUT))
    units = draw(st.integers(1, 5)) * tp
    if axis is Axis.KV:
        units = draw(
            st.sampled_from([n for n in range(1, 2 * tp + 1) if n % tp == 0 or tp % n == 0])
        )
    elif axis is Axis.VOCAB:
        units = draw(st.integers(1, 40))
    cut = Dim(axis, Extent(units, draw(st.integers(1, 3))))
    return draw(st.sampled_from([(), (whole,), (cut,), (cut, whole), (whole, cut), (whole, whole)]))


def _deal(draw: st.DrawFn, ranks: list[Mapping]) -> list[list[Mapping]]:
    """Consecutive ranks, in any number of blocks."""
    edges = sorted(draw(st.sets(st.integers(1, len(ranks)), max_size=len(ranks))) | {0, len(ranks)})
    return [ranks[low:high] for low, high in itertools.pairwise(edges)]


@given(st.data(), TP)
@settings(max_examples=300, deadline=None)
def test_every_value_is_checked_once(data: st.DataObject, tp: int) -> None:
    dims = data.draw(weights(tp))
    moe_ep = data.draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    expert_block = data.draw(st.integers(0, moe_ep - 1))
    stage = mappings(tp, 1, moe_ep)
    if any(why_not(d, tp // moe_ep if d.axis is Axis.EXPERT_FFN else tp) for d in dims):
        return
    is_expert = any(dim.axis is Axis.EXPERT_FFN for dim in dims)
    holders = [m for m in stage if not is_expert or m.moe_ep_rank == expert_block]
    checked = np.zeros([dim.size for dim in dims], int)
    for block in _deal(data.draw, stage):
        own = [mapping for mapping in block if mapping in holders]
        if not own:
            continue
        share = held(dims, holders, own)
        for mapping in own:
            for needed, dim in zip(share.needed, dims, strict=True):
                mine = part(dim, mapping)
                assert mine.start >= mine.stop or (
                    needed.start <= mine.start and mine.stop <= needed.stop
                )
        origin = tuple(needed.start for needed in share.needed)
        shape = tuple(len(needed) for needed in share.needed)
        cut = share.checked_in(origin, shape)
        if cut is not None:
            view = checked[tuple(slice(n.start, n.stop) for n in share.needed) or ...]
            view[cut] += 1
    assert (checked == 1).all()


@given(TP, st.integers(1, 5), st.integers(1, 70))
def test_ranks_are_dealt_out_whole(tp: int, pp: int, at_most: int) -> None:
    blocks = blocks_of_ranks(tp, pp, at_most)
    assert sorted(rank for block in blocks for rank in block) == list(range(tp * pp))
    assert len(blocks) <= at_most
    sizes = [len(block) for block in blocks]
    assert max(sizes) - min(sizes) <= tp  # of stages; within one, blocks differ by one rank
    if at_most >= tp * pp:
        assert set(sizes) == {1}
    for block in blocks:  # whole stages, or a part of one
        stages = {rank // tp for rank in block}
        assert len(stages) == 1 or len(block) == tp * len(stages)
