"""Memory of the target GPU, rank by rank: what fills it, what is left, and whether that is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.forecast.activations import activation_bytes, kv_heads, overhead_bytes
from pipeline.forecast.subject import Subject
from pipeline.forecast.weights import EngineWeights, engine_weights
from pipeline.parallel import Mapping, layers_of_stage

Verdict = Literal["fits", "tight", "does not fit"]
"""tight: weights and KV cache fit, but not with what is only estimated beside them."""

_KV_BYTES = {"fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class RankMemory:
    """One GPU, in bytes.

    Attributes:
        weights: exact, unless formats are still to be chosen.
        kv_bytes_per_token: of one sequence, exact.
        kv_cache: for the configured batch and length, exact.
        activations: an estimate.
        overhead: an assumption.
        capacity: of the GPU, by its data sheet.
        has_paged_cache: requests share the cache.
    """

    rank: int
    weights: EngineWeights
    kv_bytes_per_token: int
    kv_cache: int
    activations: int
    overhead: int
    capacity: int
    has_paged_cache: bool = False

    @property
    def left(self) -> int:
        """What nothing fills; negative: missing."""
        filled = self.weights.total + self.kv_cache + self.activations + self.overhead
        return self.capacity - filled

    @property
    def certain_left(self) -> int:
        """What weights and KV cache alone leave; a paged cache may be smaller than asked for."""
        cache = 0 if self.has_paged_cache else self.kv_cache
        return self.capacity - self.weights.total - cache

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        if self.left >= 0:
            return "fits"
        return "tight" if self.certain_left >= 0 else "does not fit"


def kv_bytes_per_token(subject: Subject, mapping: Mapping) -> int:
    """Keys and values of one token in the layers and heads of a rank."""
    shape = subject.shape
    layers = len(layers_of_stage(shape.num_layers, mapping.pp, mapping.pp_rank))
    element = _KV_BYTES[subject.format.kv_cache]
    return 2 * layers * kv_heads(shape, mapping.tp) * shape.head_size * element


def rank_memory(subject: Subject, mapping: Mapping) -> RankMemory:
    """Of one rank. The shape must be one that can be cut."""
    per_token = kv_bytes_per_token(subject, mapping)
    limits = subject.limits
    return RankMemory(
        rank=mapping.rank,
        weights=engine_weights(subject, mapping),
        kv_bytes_per_token=per_token,
        kv_cache=per_token * limits.max_batch_size * limits.max_seq_len,
        activations=activation_bytes(subject, mapping),
        overhead=overhead_bytes(subject),
        capacity=subject.target.memory_bytes,
        has_paged_cache=subject.has_paged_cache,
    )


def rank_memories(subject: Subject) -> tuple[RankMemory, ...]:
    """Of every rank, in rank order."""
    return tuple(rank_memory(subject, mapping) for mapping in subject.ranks)


def fullest(memories: tuple[RankMemory, ...]) -> RankMemory:
    """The rank that has least left; the first of equals."""
    return min(memories, key=lambda memory: memory.left)


def fits(subject: Subject) -> bool:
    """Whether every rank fits, even if what is estimated takes a quarter more: what is advised should
    not fail by an estimate. The shape must be one that can be cut."""
    return all(
        rank.left >= (rank.activations + rank.overhead) // 4 for rank in rank_memories(subject)
    )
