"""Where architecture, format and mapping meet: every tensor of a rank, and what it is made of.

Works from a ModelShape alone, without weights; convert, plan and the synthetic writer all use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.checkpoint.choices import nearest_choices
from pipeline.checkpoint.writer import TensorSpec, file_bytes
from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, Fused, ModelShape, Scope, Source, WeightRule
from pipeline.parallel import (
    Axis,
    Dim,
    Mapping,
    experts_of_rank,
    layers_of_stage,
    part,
    why_not,
)
from pipeline.quant.formats import GROUP_SIZES, PLAIN, QuantFormat, StoredTensor

_TP_CHOICES = range(1, 17)


@dataclass(frozen=True)
class RowRuns:
    """Which rows of a stored tensor a source owns: in each of `count` groups of `stride` rows, `rows`
    rows from `start` on."""

    count: int
    stride: int
    start: int
    rows: int


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the Hugging Face checkpoint, or the part of one that is one weight.

    Attributes:
        dtypes: safetensors dtypes that can be read.
        dims: of the weight as [out, in], whatever its storage.
        required: False when the format has a neutral value for it.
        kind: the rule and tensor that it belongs to: the same in every layer and for fused sources.
        transposed: stored as [in, out].
        runs: the rows of a tensor that holds other weights too; None: all rows.
        offset: added to every value.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    required: bool
    kind: str
    transposed: bool = False
    runs: RowRuns | None = None
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape, of the whole tensor."""
        sizes = [dim.size for dim in self.dims]
        if self.runs is not None:
            sizes[0] = self.runs.count * self.runs.stride
        return tuple(reversed(sizes)) if self.transposed else tuple(sizes)


@dataclass(frozen=True)
class TargetTensor:
    """A tensor of a TensorRT-LLM rank file.

    Attributes:
        sources: joined along dimension 0 if `joined`, otherwise they must all be the same tensor.
        fill: written when none of the sources exist; None: they are required.
        num_experts: the tensor stacks those of the rank, and `sources` lists all, one after the other;
            0: no experts.
    """

    name: str
    dtype: str
    sources: tuple[SourceTensor, ...]
    joined: bool
    fill: float | None
    num_experts: int = 0

    def held_sources(self, mapping: Mapping) -> tuple[SourceTensor, ...]:
        """The sources of which a rank holds a part: those of its experts."""
        if not self.num_experts:
            return self.sources
        experts = experts_of_rank(self.num_experts, mapping)
        each = len(self.sources) // self.num_experts
        return self.sources[experts.start * each : experts.stop * each]

    def spec(self, mapping: Mapping) -> TensorSpec:
        """Its shape on one rank."""
        held = self.held_sources(mapping)
        shape = [part(dim, mapping).size for dim in held[0].dims]
        if self.joined:
            shape[0] = sum(part(source.dims[0], mapping).size for source in held)
        if self.num_experts:
            stacked = self.num_experts // mapping.moe_ep
            shape = [stacked, shape[0] // stacked, *shape[1:]]
        return TensorSpec(self.name, self.dtype, tuple(shape) or (1,))


def scope_targets(
    shape: ModelShape, fmt: QuantFormat, scope: Scope, pp: int = 1
) -> list[TargetTensor]:
    """Targets of the first or the last of `pp` stages that belong to no layer."""
    assert scope is not Scope.LAYER
    return [
        target for rule in _rules(shape, scope, pp) for target in _targets(rule, shape, fmt, {})
    ]


def layer_targets(
    shape: ModelShape, fmt: QuantFormat, layer: int, local_layer: int
) -> list[TargetTensor]:
    """Targets of one layer. Their names count from the first layer of the stage: `local_layer`."""
    numbers = {"source": layer, "target": local_layer}
    return [
        target
        for rule in _rules(shape, Scope.LAYER)
        for target in _targets(rule, shape, fmt, numbers)
    ]


def stage_targets(
    shape: ModelShape, fmt: QuantFormat, pp: int, pp_rank: int
) -> Iterator[TargetTensor]:
    """Every target of one pipeline stage."""
    if pp_rank == 0:
        yield from scope_targets(shape, fmt, Scope.FIRST, pp)
    for local_layer, layer in enumerate(layers_of_stage(shape.num_layers, pp, pp_rank)):
        yield from layer_targets(shape, fmt, layer, local_layer)
    if pp_rank == pp - 1:
        yield from scope_targets(shape, fmt, Scope.LAST, pp)


def planned_sources(shape: ModelShape, fmt: QuantFormat) -> list[SourceTensor]:
    """Every tensor that a Hugging Face checkpoint of this shape and format may hold, each once."""
    found: dict[str, SourceTensor] = {}
    for target in stage_targets(shape, fmt, pp=1, pp_rank=0):
        for source in target.sources:
            found.setdefault(source.name, source)
    return list(found.values())


def planned_tensors(shape: ModelShape, fmt: QuantFormat, mapping: Mapping) -> list[TensorSpec]:
    """Every tensor of one rank file, exactly as convert writes it. `mapping_problems` must be empty."""
    return [
        target.spec(mapping) for target in stage_targets(shape, fmt, mapping.pp, mapping.pp_rank)
    ]


def planned_bytes(shape: ModelShape, fmt: QuantFormat, mapping: Mapping) -> int:
    """Exact size of one rank file."""
    return file_bytes(planned_tensors(shape, fmt, mapping))


def mapping_problems(
    shape: ModelShape, fmt: QuantFormat, tp: int, pp: int, moe_ep: int = 1
) -> list[Problem]:
    """Why this model cannot be stored in this format or cut this way, with the legal choices."""
    problems = []
    whole = _cut_problems(shape, fmt, tp=1)
    illegal_experts = _expert_problem(shape, tp, moe_ep)
    if whole:
        fits = [str(size) for size in GROUP_SIZES if _fits_group_size(shape, fmt, size)]
        allowed = f"group_size {' or '.join(fits)}" if fits else ""
        problems += [Problem(f"format {fmt.name}", what, allowed) for what in whole]
    elif illegal_experts:
        problems.append(illegal_experts)
    else:
        choices = [
            str(n)
            for n in _TP_CHOICES
            if n % moe_ep == 0 and not _cut_problems(shape, fmt, n, moe_ep)
        ]
        allowed = f"tp {', '.join(choices)}"
        fix = nearest_choices(shape, fmt, tp, _cut_problems)
        problems += [
            Problem(f"tp={tp}", what, allowed, fix)
            for what in _cut_problems(shape, fmt, tp, moe_ep)
        ]
    if pp > shape.num_layers:
        what = f"the model has only {shape.num_layers} layers"
        problems.append(Problem(f"pp={pp}", what, f"pp 1 to {shape.num_layers}"))
    return problems


def _expert_problem(shape: ModelShape, tp: int, moe_ep: int) -> Problem | None:
    choices = [n for n in range(1, tp + 1) if tp % n == 0 and (shape.num_experts or 1) % n == 0]
    if moe_ep in choices:
        return None
    what = f"{shape.num_experts} experts on tp={tp} ranks cannot be shared out in {moe_ep} blocks"
    if not shape.num_experts:
        what = "the model has no experts"
        choices = [1]
    return Problem(f"moe_ep={moe_ep}", what, f"moe_ep {', '.join(map(str, choices))}")


def _cut_problems(shape: ModelShape, fmt: QuantFormat, tp: int, moe_ep: int = 1) -> list[str]:
    targets = [
        *scope_targets(shape, fmt, Scope.FIRST),
        *layer_targets(shape, fmt, layer=0, local_layer=0),
        *scope_targets(shape, fmt, Scope.LAST),
    ]
    dims = dict.fromkeys(
        dim for target in targets for source in target.sources for dim in source.dims
    )
    reasons = (why_not(dim, tp // moe_ep if dim.axis is Axis.EXPERT_FFN else tp) for dim in dims)
    return [reason for reason in reasons if reason]


def _fits_group_size(shape: ModelShape, fmt: QuantFormat, group_size: int) -> bool:
    if fmt.group_size is None:
        return False
    return not _cut_problems(shape, fmt.with_group_size(group_size), tp=1)


def _rules(shape: ModelShape, scope: Scope, pp: int = 1) -> list[WeightRule]:
    architecture = ARCHITECTURES[shape.architecture]
    rules = architecture.rules_for(shape, scope)
    if architecture.shares_head and pp == 1 and scope is Scope.LAST:
        return [rule for rule in rules if not rule.tied_sources]
    return rules


def _targets(
    rule: WeightRule, shape: ModelShape, fmt: QuantFormat, layers: dict[str, int]
) -> Iterator[TargetTensor]:
    """What one rule writes; `layers` numbers the {layer} of source and target names."""
    target_name = rule.target.format(layer=layers.get("target"))
    plain = tuple(
        replace(stored, source=rule.suffix, target=rule.suffix, target_dtype=rule.dtype)
        for stored in PLAIN
    )
    for stored in fmt.tensors if rule.quantized else plain:
        sources = tuple(
            _source(rule, source, stored, shape, fmt, {"layer": layers.get("source"), **expert})
            for expert in _experts(rule, shape)
            for source in rule.sources_for(shape)
        )
        yield TargetTensor(
            name=f"{target_name}.{stored.target}",
            dtype=stored.target_dtype,
            sources=sources,
            joined=_follows_rows(stored),
            fill=stored.fill,
            num_experts=shape.num_experts if rule.experts else 0,
        )


def _experts(rule: WeightRule, shape: ModelShape) -> list[dict[str, int]]:
    if not rule.experts:
        return [{}]
    return [{"expert": expert} for expert in range(shape.num_experts)]


def _follows_rows(stored: StoredTensor) -> bool:
    return stored.dims is None or (bool(stored.dims) and stored.dims[0].parent == 0)


def _source(
    rule: WeightRule,
    source: Source,
    stored: StoredTensor,
    shape: ModelShape,
    fmt: QuantFormat,
    numbers: dict[str, int | None],
) -> SourceTensor:
    """`numbers`: of {layer} and {expert} in the name."""
    if stored.dims is None:
        dims = tuple(Dim(axis, shape.extent(axis)) for axis in source.axes)
    else:
        dims = tuple(
            Dim(source.axes[dim.parent], shape.extent(source.axes[dim.parent]), fmt.divisor(dim))
            for dim in stored.dims
        )
    has_rows = _follows_rows(stored)
    return SourceTensor(
        name=f"{source.name.format(**numbers)}.{stored.source}",
        dtypes=stored.source_dtypes,
        dims=dims,
        required=stored.fill is None,
        kind=f"{rule.target}.{stored.target}",
        transposed=source.transposed,
        runs=_runs(source.fused, shape, dims[0].divisor) if source.fused and has_rows else None,
        offset=source.offset,
    )


def _runs(fused: Fused, shape: ModelShape, divisor: int) -> RowRuns:
    groups = shape.num_kv_heads if fused.per_kv_head else 1
    sizes = [shape.extent(axis).size // groups // divisor for axis in fused.parts]
    return RowRuns(groups, sum(sizes), sum(sizes[: fused.index]), sizes[fused.index])
