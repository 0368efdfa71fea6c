"""Named axes, ranks, and the one rule of how a stored tensor is cut for tensor and pipeline parallelism.

Tensor parallelism cuts a dimension if and only if its axis is in `CUT_AXES`: Q and KV at whole heads,
the others at single rows. KV heads are repeated when there are more ranks than heads; VOCAB and POSITION
are padded with zero rows to a multiple of tp, any axis to `Extent.padded_units`. Pipeline parallelism
cuts the list of layers.
The rules and the rank algebra are those of TensorRT-LLM 1.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import CheckpointError, Problem

Array = npt.NDArray[Any]


class Axis(Enum):
    """What a dimension of a weight means; the value names the field of config.json that sizes it."""

    HIDDEN = "hidden_size"
    Q = "num_attention_heads"
    KV = "num_key_value_heads"
    FFN = "intermediate_size"
    VOCAB = "vocab_size"
    HEAD = "head_dim"
    POSITION = "max_position_embeddings"
    EXPERT = "num_local_experts"  # rows of the router, which every rank holds whole
    EXPERT_FFN = "intermediate_size of an expert"


CUT_AXES = frozenset({Axis.Q, Axis.KV, Axis.FFN, Axis.VOCAB, Axis.POSITION, Axis.EXPERT_FFN})
PADDED_AXES = frozenset({Axis.VOCAB, Axis.POSITION})
"""Rows of embedding tables, which TensorRT-LLM cuts alike."""


@dataclass(frozen=True)
class Mapping:
    """Where one rank stands: rank = pp_rank * tp + tp_rank.

    The tensor-parallel ranks of a stage share out experts in `moe_ep` blocks, and within a block cut
    each expert: tp_rank = moe_tp_rank * moe_ep + moe_ep_rank.
    """

    tp: int = 1
    pp: int = 1
    rank: int = 0
    moe_ep: int = 1

    def __post_init__(self) -> None:
        assert self.moe_ep >= 1, self
        assert self.tp % self.moe_ep == 0, self
        assert self.tp >= 1, self
        assert self.pp >= 1, self
        assert 0 <= self.rank < self.tp * self.pp, self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        """Which slice of every layer this rank holds."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """Which stage of layers this rank holds."""
        return self.rank // self.tp

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp // self.moe_ep

    @property
    def moe_tp_rank(self) -> int:
        """Which slice of its experts this rank holds."""
        return self.tp_rank // self.moe_ep

    @property
    def moe_ep_rank(self) -> int:
        """Which block of experts this rank holds."""
        return self.tp_rank % self.moe_ep


def mappings(tp: int, pp: int, moe_ep: int = 1) -> list[Mapping]:
    """The mapping of every rank, in rank order."""
    return [Mapping(tp, pp, rank, moe_ep) for rank in range(tp * pp)]


def experts_of_rank(num_experts: int, mapping: Mapping) -> range:
    """The experts that a rank holds, whole or in part; moe_ep must divide their number."""
    assert num_experts % mapping.moe_ep == 0, (num_experts, mapping)
    count = num_experts // mapping.moe_ep
    return range(mapping.moe_ep_rank * count, (mapping.moe_ep_rank + 1) * count)


def layers_of_stage(num_layers: int, pp: int, pp_rank: int) -> range:
    """Layers of one pipeline stage. When pp does not divide, the first stages hold one more."""
    assert 0 <= pp_rank < pp <= num_layers, (num_layers, pp, pp_rank)
    short, longer = divmod(num_layers, pp)
    start = pp_rank * short + min(pp_rank, longer)
    return range(start, start + short + (pp_rank < longer))


@dataclass(frozen=True)
class Extent:
    """Size of one axis in one model.

    Attributes:
        units: how many pieces may not be cut further: heads for Q and KV, else rows.
        unit_size: elements of one unit: head_size for Q and KV, else 1.
        padded_units: with units of zeros behind the real ones, where ranks hold them; 0: none.
    """

    units: int
    unit_size: int = 1
    padded_units: int = 0

    @property
    def size(self) -> int:
        """Elements of the whole axis, without padding."""
        return self.units * self.unit_size


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor.

    Attributes:
        divisor: elements of the axis that one stored element stands for (2 for packed int4 rows, the
            group size for scales, else 1).
    """

    axis: Axis
    extent: Extent
    divisor: int = 1

    @property
    def size(self) -> int:
        """Stored elements of the whole dimension."""
        return self.extent.size // self.divisor


@dataclass(frozen=True)
class Part:
    """What one rank holds of one dimension: stored elements [start, stop), then `padding` zeros."""

    start: int
    stop: int
    padding: int = 0

    @property
    def size(self) -> int:
        """Stored elements on the rank."""
        return self.stop - self.start + self.padding


def why_not(dim: Dim, tp: int) -> str:
    """Why `dim` cannot be cut for `tp` ranks (moe_tp for EXPERT_FFN); empty when it can."""
    extent, name = dim.extent, dim.axis.value
    if extent.size % dim.divisor:
        return f"{name}: {extent.size} elements are not a multiple of {dim.divisor}"
    if dim.axis not in CUT_AXES:
        return ""
    units = _units_per_rank(dim, tp)
    if units is None:
        return f"{name} {extent.units} cannot be shared out evenly over tp={tp}"
    if units * extent.unit_size % dim.divisor:
        return (
            f"{name}: {units * extent.unit_size} elements on each of tp={tp} ranks are not a "
            f"multiple of {dim.divisor}"
        )
    return ""


def _units_per_rank(dim: Dim, tp: int) -> int | None:
    units = dim.extent.padded_units or dim.extent.units
    if dim.axis in PADDED_AXES:
        return -(-units // tp)
    if units % tp == 0:
        return units // tp
    if dim.axis is Axis.KV and tp % units == 0:
        return 1
    return None


def part(dim: Dim, mapping: Mapping) -> Part:
    """The part of `dim` that a rank holds. The cut must be legal (`why_not` is empty)."""
    tp, tp_rank = mapping.tp, mapping.tp_rank
    if dim.axis is Axis.EXPERT_FFN:
        tp, tp_rank = mapping.moe_tp, mapping.moe_tp_rank
    assert not why_not(dim, tp), why_not(dim, tp)
    if dim.axis not in CUT_AXES:
        return Part(0, dim.size)
    units = _units_per_rank(dim, tp)
    assert units is not None
    repeated = dim.axis is Axis.KV and dim.extent.units < tp
    first = tp_rank * dim.extent.units // tp if repeated else tp_rank * units
    stored = dim.extent.unit_size
    start = min(first * stored // dim.divisor, dim.size)
    stop = min((first + units) * stored // dim.divisor, dim.size)
    return Part(start, stop, units * stored // dim.divisor - (stop - start))


def shard(x: Array, dims: Sequence[Dim], mapping: Mapping) -> Array:
    """The part of a stored tensor that one rank holds, same dtype; zeros where it is padded.

    At most one dimension may be cut: a rank would otherwise hold a corner that no other rank completes.
    """
    assert sum(dim.axis in CUT_AXES for dim in dims) <= 1, dims
    assert x.shape == tuple(dim.size for dim in dims), (x.shape, dims)
    parts = [part(dim, mapping) for dim in dims]
    cut = x[tuple(slice(p.start, p.stop) for p in parts)]
    if not any(p.padding for p in parts):
        return cut
    padded = np.zeros([p.size for p in parts], x.dtype)
    padded[tuple(slice(0, p.stop - p.start) for p in parts)] = cut
    return padded


def unshard(shards: Sequence[Array], dims: Sequence[Dim]) -> Array:
    """The whole tensor from the parts of all tensor-parallel ranks in tp_rank order.

    Raises:
        CheckpointError: repeated heads differ between ranks, or padding is not zero.
    """
    tp = len(shards)
    whole = np.zeros([dim.size for dim in dims], shards[0].dtype)
    for mapping, x in zip(mappings(tp, 1), shards, strict=True):
        parts = [part(dim, mapping) for dim in dims]
        assert x.shape == tuple(p.size for p in parts), (x.shape, parts)
        valid = x[tuple(slice(0, p.stop - p.start) for p in parts)]
        whole[tuple(slice(p.start, p.stop) for p in parts)] = valid
    for mapping, x in zip(mappings(tp, 1), shards, strict=True):
        if shard(whole, dims, mapping).tobytes() != x.tobytes():
            raise CheckpointError(
                Problem(
                    f"tp_rank {mapping.tp_rank}",
                    "its part contradicts the other ranks: repeated heads differ or padding is not zero",
                )
            )
    return whole
