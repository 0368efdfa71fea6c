"""Rank algebra and cuts, against numbers written by hand from TensorRT-LLM's rules."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import CheckpointError
from pipeline.parallel import (
    Axis,
    Dim,
    Extent,
    Mapping,
    Part,
    layers_of_stage,
    mappings,
    part,
    shard,
    unshard,
    why_not,
)

HIDDEN = Dim(Axis.HIDDEN, Extent(256))


def test_rank_algebra() -> None:
    # rank = pp_rank * tp + tp_rank
    places = [(m.rank, m.tp_rank, m.pp_rank, m.world_size) for m in mappings(2, 3)]
    assert places == [
        (0, 0, 0, 6),
        (1, 1, 0, 6),
        (2, 0, 1, 6),
        (3, 1, 1, 6),
        (4, 0, 2, 6),
        (5, 1, 2, 6),
    ]


@pytest.mark.parametrize(
    ("num_layers", "pp", "expected"),
    [
        (32, 1, [32]),
        (32, 4, [8, 8, 8, 8]),
        (10, 4, [3, 3, 2, 2]),  # TensorRT-LLM 1.x: the first stages take the remainder
        (6, 4, [2, 2, 1, 1]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_layers_of_stage(num_layers: int, pp: int, expected: list[int]) -> None:
    stages = [layers_of_stage(num_layers, pp, pp_rank) for pp_rank in range(pp)]
    assert [len(stage) for stage in stages] == expected
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_kv_heads_are_repeated_when_ranks_outnumber_them() -> None:
    # 2 KV heads of 64 channels over tp 4: rank r holds head floor(r * 2 / 4)
    heads = Dim(Axis.KV, Extent(2, 64))
    assert [part(heads, Mapping(4, 1, rank)) for rank in range(4)] == [
        Part(0, 64),
        Part(0, 64),
        Part(64, 128),
        Part(64, 128),
    ]


def test_vocabulary_is_padded_at_the_end() -> None:
    rows = Dim(Axis.VOCAB, Extent(515))
    assert [part(rows, Mapping(2, 1, rank)) for rank in range(2)] == [
        Part(0, 258),
        Part(258, 515, 1),
    ]
    # Fewer rows than a rank would start at: all padding.
    few = Dim(Axis.VOCAB, Extent(5))
    assert [part(few, Mapping(4, 1, rank)) for rank in range(4)] == [
        Part(0, 2),
        Part(2, 4),
        Part(4, 5, 1),
        Part(5, 5, 2),
    ]


def test_packed_rows_and_groups_are_cut_in_stored_elements() -> None:
    assert part(Dim(Axis.Q, Extent(4, 64), 2), Mapping(2, 1, 1)) == Part(64, 128)
    assert part(Dim(Axis.FFN, Extent(768), 128), Mapping(2, 1, 1)) == Part(3, 6)
    assert part(Dim(Axis.HIDDEN, Extent(256), 128), Mapping(2, 1, 1)) == Part(0, 2)


@pytest.mark.parametrize(
    ("dim", "tp", "reason"),
    [
        (
            Dim(Axis.Q, Extent(28, 128)),
            8,
            "num_attention_heads 28 cannot be shared out evenly over tp=8",
        ),
        (
            Dim(Axis.KV, Extent(4, 128)),
            6,
            "num_key_value_heads 4 cannot be shared out evenly over tp=6",
        ),
        (
            Dim(Axis.FFN, Extent(11008), 128),
            4,
            "intermediate_size: 2752 elements on each of tp=4 ranks are not a multiple of 128",
        ),
        (
            Dim(Axis.HIDDEN, Extent(192), 128),
            1,
            "hidden_size: 192 elements are not a multiple of 128",
        ),
        (Dim(Axis.FFN, Extent(7)), 2, "intermediate_size 7 cannot be shared out evenly over tp=2"),
        (Dim(Axis.KV, Extent(2, 64)), 8, ""),
        (Dim(Axis.VOCAB, Extent(32003)), 8, ""),
        (HIDDEN, 7, ""),
    ],
)
def test_why_not(dim: Dim, tp: int, reason: str) -> None:
    assert why_not(dim, tp) == reason


def test_unshard_refuses_ranks_that_contradict_each_other() -> None:
    heads = (Dim(Axis.KV, Extent(1, 4)), HIDDEN)
    x = np.arange(1024, dtype=np.int32).reshape(4, 256)
    shards = [shard(x, heads, mapping).copy() for mapping in mappings(2, 1)]
    np.testing.assert_array_equal(unshard(shards, heads), x)
    shards[0][2, 3] += 1
    with pytest.raises(CheckpointError, match="tp_rank 0: its part contradicts the other ranks"):
        unshard(shards, heads)


def test_unshard_refuses_padding_that_is_not_zero() -> None:
    rows = (Dim(Axis.VOCAB, Extent(3)),)
    with pytest.raises(CheckpointError, match=r"tp_rank 1: .*padding is not zero"):
        unshard([np.array([1, 2]), np.array([3, 4])], rows)
