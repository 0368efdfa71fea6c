"""unshard(shard(x)) == x, and every rank holds what TensorRT-LLM's rule says, for any legal cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parallel import (
    Axis,
    Dim,
    Extent,
    experts_of_rank,
    layers_of_stage,
    mappings,
    part,
    shard,
    unshard,
    why_not,
)

TP = st.sampled_from([1, 2, 3, 4, 8])
WHOLE = {Axis.HIDDEN, Axis.HEAD, Axis.EXPERT}  # every rank holds all of these


@st.composite
def dims(draw: st.DrawFn, tp: int) -> Dim:
    """A dimension that can be cut for tp ranks; the divisor is drawn first so that it always fits."""
    axis = draw(st.sampled_from(list(Axis)))
    if axis in (Axis.VOCAB, Axis.POSITION):
        return Dim(axis, Extent(draw(st.integers(1, 40))))
    divisor = draw(st.sampled_from([1, 2, 4]))
    unit_size = divisor * draw(st.integers(1, 3)) if axis in (Axis.Q, Axis.KV) else 1
    per_rank = draw(st.integers(1, 3)) * (1 if unit_size > 1 else divisor)
    units = per_rank * tp
    if axis is Axis.KV and draw(st.booleans()):
        units = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
        unit_size = divisor * draw(st.integers(1, 3))
    return Dim(axis, Extent(units, unit_size), divisor)


@given(st.data(), TP)
@settings(deadline=None)
def test_round_trip(data: st.DataObject, tp: int) -> None:
    chosen = data.draw(
        st.lists(dims(tp), min_size=1, max_size=3).filter(
            lambda drawn: sum(dim.axis not in WHOLE for dim in drawn) <= 1
        )
    )
    assert [why_not(dim, tp) for dim in chosen] == [""] * len(chosen)
    shape = [dim.size for dim in chosen]
    x = np.arange(1, 1 + np.prod(shape), dtype=np.int64).reshape(shape)
    shards = [shard(x, chosen, mapping) for mapping in mappings(tp, 1)]
    assert len({piece.shape for piece in shards}) == 1, "ranks must have equal shapes"
    np.testing.assert_array_equal(unshard(shards, chosen), x)


@given(st.data(), TP)
@settings(deadline=None)
def test_parts_cover_the_dimension(data: st.DataObject, tp: int) -> None:
    dim = data.draw(dims(tp))
    covered = np.zeros(dim.size, int)
    for mapping in mappings(tp, 1):
        piece = part(dim, mapping)
        covered[piece.start : piece.stop] += 1
    if dim.axis in WHOLE:
        expected = tp
    elif dim.axis is Axis.KV and dim.extent.units < tp:
        expected = tp // dim.extent.units
    else:
        expected = 1
    assert (covered == expected).all()


@given(st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 4), TP)
@settings(deadline=None)
def test_attention_heads_stay_with_their_kv_head(
    num_kv_heads: int, queries_per_kv: int, head_size: int, tp: int
) -> None:
    """Every query head of a rank finds its KV head on the same rank, as grouped attention needs."""
    num_heads = num_kv_heads * queries_per_kv
    q, kv = (
        Dim(Axis.Q, Extent(num_heads, head_size)),
        Dim(Axis.KV, Extent(num_kv_heads, head_size)),
    )
    if why_not(q, tp) or why_not(kv, tp):
        return
    for mapping in mappings(tp, 1):
        q_heads = np.unique(
            np.arange(q.size)[part(q, mapping).start : part(q, mapping).stop] // head_size
        )
        kv_heads = np.unique(
            np.arange(kv.size)[part(kv, mapping).start : part(kv, mapping).stop] // head_size
        )
        assert set(q_heads // queries_per_kv) == set(kv_heads)


@given(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 2)]), st.integers(1, 3))
def test_experts_and_their_slices_cover_every_expert(ep: tuple[int, int], each: int) -> None:
    """tp_rank = moe_tp_rank * moe_ep + moe_ep_rank: each slice of each expert is on one rank."""
    tp, moe_ep = ep
    num_experts, ffn = each * moe_ep, Dim(Axis.EXPERT_FFN, Extent(5 * tp // moe_ep))
    covered = np.zeros((num_experts, ffn.size), int)
    for mapping in mappings(tp, 1, moe_ep):
        assert mapping.tp_rank == mapping.moe_tp_rank * moe_ep + mapping.moe_ep_rank
        rows = part(ffn, mapping)
        experts = experts_of_rank(num_experts, mapping)
        covered[experts.start : experts.stop, rows.start : rows.stop] += 1
    assert (covered == 1).all()


@given(st.integers(1, 100), st.integers(1, 16))
@settings(deadline=None)
def test_stages_partition_the_layers(num_layers: int, pp: int) -> None:
    if pp > num_layers:
        return
    stages = [list(stage) for stage in np.array_split(np.arange(num_layers), pp)]
    assert [list(layers_of_stage(num_layers, pp, rank)) for rank in range(pp)] == stages
