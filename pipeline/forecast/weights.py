"""Weights in the engine of a rank, to the byte, from the tables that also make its checkpoint.

An engine holds what the rank file holds, but for: int4 scales and zero points are float16 there, numbers
(one scale for a whole tensor) are part of the code, pre-quant scales that were folded into the norm
before them are not there, and rotary tables are. Shapes: N output features, K input features, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.checkpoint.layout import TargetTensor, layer_targets, planned_sizes, scope_targets
from pipeline.checkpoint.trtllm_config import MATRIX, trtllm_config
from pipeline.forecast.subject import Subject, by_budget
from pipeline.models import ModelShape, Scope
from pipeline.network.spec_reader import read_spec
from pipeline.parallel import Mapping, layers_of_stage
from pipeline.quant.formats import FORMATS, QuantFormat

_SCALES = "weights_scaling_factor"
_ZERO_POINTS = "weights_zero_point"
_PRE_QUANT = "prequant_scaling_factor"
_KEPT_PRE_QUANT = (".attention.dense", ".mlp.proj")
"""Linears without a norm before them, into which their scale could be folded."""
_EMBEDDINGS = "embedding.weight"


@dataclass(frozen=True)
class EngineWeights:
    """Bytes of weights in one engine.

    Attributes:
        codes: quantized weights of linears.
        scales: what belongs to them: scales, zero points, pre-quant scales.
        plain: float16 (routers: float32) tensors, embeddings and lm_head included.
        tables: of rotary positions.
        embeddings: of `plain`, tables of which a step reads one row a token, unless lm_head shares them.
    """

    codes: int
    scales: int
    plain: int
    tables: int
    embeddings: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.codes + self.scales + self.plain + self.tables

    @property
    def read_per_step(self) -> int:
        """What a decode step must read at least."""
        return self.total - self.embeddings - self.tables


def checkpoint_bytes(subject: Subject) -> tuple[int, ...]:
    """TensorRT-LLM checkpoint file of each rank: exact, or what a budget leaves of the weights."""
    sizes = tuple(planned_sizes(subject.shape, subject.format, subject.ranks))
    if subject.budget_bits is None:
        return sizes
    halved = planned_sizes(subject.shape, FORMATS["fp8"], subject.ranks)
    bits = subject.budget_bits
    return tuple(by_budget(size, half, bits) for size, half in zip(sizes, halved, strict=True))


def plain_bytes(shape: ModelShape) -> int:
    """Of the original as float16, where it is not here yet."""
    (size,) = planned_sizes(shape, FORMATS["fp16"], [Mapping()])
    return size


def engine_weights(subject: Subject, mapping: Mapping) -> EngineWeights:
    """Weights of one rank's engine. The shape must be one that can be cut (`cut_problems` is empty)."""
    weights = _stored(subject.shape, subject.format, mapping)
    if subject.budget_bits is not None:
        full, halved = weights, _stored(subject.shape, FORMATS["fp8"], mapping)
        bits = subject.budget_bits
        codes = by_budget(full.codes + full.plain, halved.codes + halved.plain, bits)
        weights = replace(full, codes=codes - full.plain)
    return replace(weights, tables=table_bytes(subject.shape, subject.limits.max_seq_len))


def table_bytes(shape: ModelShape, num_positions: int) -> int:
    """The float16 cosines and sines of every position."""
    return 2 * 2 * num_positions * (_rotated_channels(shape) // 2)


@lru_cache(maxsize=64)
def _rotated_channels(shape: ModelShape) -> int:
    """As the network reads them from the checkpoint's config.json."""
    spec = read_spec(trtllm_config(shape, FORMATS["fp16"], tp=1, pp=1), "config.json")
    rotary = spec.features.rotary
    return 0 if rotary is None else rotary.num_channels


@lru_cache(maxsize=512)
def _stored(shape: ModelShape, fmt: QuantFormat, mapping: Mapping) -> EngineWeights:
    """Without rotary tables. Every rank of a stage holds as much, so layers are weighed once."""
    layers = layers_of_stage(shape.num_layers, mapping.pp, mapping.pp_rank)
    is_first, is_last = mapping.pp_rank == 0, mapping.pp_rank == mapping.pp - 1
    total = EngineWeights(0, 0, 0, 0, 0)
    if is_first:
        total = _weighed(total, scope_targets(shape, fmt, Scope.FIRST, mapping.pp), mapping)
        if is_last and not _has_head(shape, fmt, mapping):
            total = replace(total, embeddings=0)  # lm_head reads the table as a whole
    if is_last:
        total = _weighed(total, scope_targets(shape, fmt, Scope.LAST, mapping.pp), mapping)
    if fmt.exceptions:
        for layer in layers:
            total = _weighed(total, layer_targets(shape, fmt, layer, 0), mapping)
        return total
    return _weighed(total, layer_targets(shape, fmt, layers.start, 0), mapping, count=len(layers))


def _has_head(shape: ModelShape, fmt: QuantFormat, mapping: Mapping) -> bool:
    last = scope_targets(shape, fmt, Scope.LAST, mapping.pp)
    return any(target.name == "lm_head.weight" for target in last)


def _weighed(
    total: EngineWeights, targets: list[TargetTensor], mapping: Mapping, count: int = 1
) -> EngineWeights:
    for target in targets:
        one = _tensor(target, mapping)
        total = EngineWeights(
            codes=total.codes + count * one.codes,
            scales=total.scales + count * one.scales,
            plain=total.plain + count * one.plain,
            tables=0,
            embeddings=total.embeddings + count * one.embeddings,
        )
    return total


def _tensor(target: TargetTensor, mapping: Mapping) -> EngineWeights:
    """What one tensor of the rank file becomes."""
    spec = target.spec(mapping)
    module, _, kind = spec.name.rpartition(".")
    own_shape = spec.shape[1:] if target.num_experts else spec.shape
    size, elements = spec.nbytes, math.prod(spec.shape)
    codes = scales = plain = 0
    if kind in (_SCALES, _ZERO_POINTS):
        # [N, G] of int4 become float16; [N] of int8 stay; a number goes into the code.
        scales = 2 * elements if len(own_shape) == MATRIX else size
        scales = 0 if math.prod(own_shape) == 1 else scales
    elif kind == _PRE_QUANT:
        scales = size if module.endswith(_KEPT_PRE_QUANT) else 0
    elif kind in ("weight", "bias"):
        codes, plain = (size, 0) if spec.dtype in ("I8", "F8_E4M3") else (0, size)
    embeddings = plain if spec.name.endswith(_EMBEDDINGS) else 0
    return EngineWeights(codes, scales, plain, 0, embeddings)
