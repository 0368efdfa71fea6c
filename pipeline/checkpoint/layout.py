"""Where architecture, format and mapping meet: every tensor of a rank, and what it is made of.

Works from a ModelShape alone, without weights; convert, plan and the synthetic writer all use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from pipeline.checkpoint.choices import nearest_choices
from pipeline.checkpoint.writer import TensorSpec, file_bytes
from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, Fused, ModelShape, Scope, Source, WeightRule
from pipeline.models.linears import fused_groups, head_rule, rule_linears
from pipeline.models.rules import LAYER
from pipeline.parallel import (
    Axis,
    Dim,
    Mapping,
    experts_of_rank,
    layers_of_stage,
    part,
    why_not,
)
from pipeline.quant.formats import FORMATS, GROUP_SIZES, PLAIN, KvCache, QuantFormat, StoredTensor

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
        scale: name of the number that scales its codes; joined codes need one for all. Empty: none.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    required: bool
    kind: str
    transposed: bool = False
    runs: RowRuns | None = None
    offset: float = 0.0
    scale: str = ""

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
        sources: joined along dimension 0 if `joined`, otherwise they must all be the same tensor: those
            of each expert, where experts are stacked.
        fill: written when none of the sources exist; None: they are required.
        num_experts: the tensor stacks those of the rank, and `sources` lists all, one after the other;
            0: nothing is stacked.
        at_least: the tensor is one number (of each expert), the largest of the sources' and this;
            None: they must all be the same tensor, or are joined.
    """

    name: str
    dtype: str
    sources: tuple[SourceTensor, ...]
    joined: bool
    fill: float | None
    num_experts: int = 0
    at_least: float | None = None

    def held_sources(self, mapping: Mapping) -> tuple[SourceTensor, ...]:
        """The sources of which a rank holds a part: those of its experts."""
        return tuple(source for same in self.held_groups(mapping) for source in same)

    @property
    def groups(self) -> tuple[tuple[SourceTensor, ...], ...]:
        """The sources of each expert; without a stack all of them."""
        each = len(self.sources) // max(self.num_experts, 1)
        starts = range(0, len(self.sources), each)
        return tuple(self.sources[start : start + each] for start in starts)

    def held_groups(self, mapping: Mapping) -> tuple[tuple[SourceTensor, ...], ...]:
        """The groups of the experts that a rank holds."""
        if not self.num_experts:
            return self.groups
        experts = experts_of_rank(self.num_experts, mapping)
        return self.groups[experts.start : experts.stop]

    def spec(self, mapping: Mapping) -> TensorSpec:
        """Its shape on one rank."""
        groups = self.held_groups(mapping)
        shape = [part(dim, mapping).size for dim in groups[0][0].dims] or [1]
        if self.joined:
            shape[0] = sum(part(source.dims[0], mapping).size for source in groups[0])
        stack = [len(groups)] if self.num_experts else []
        return TensorSpec(self.name, self.dtype, (*stack, *shape))


def scope_targets(
    shape: ModelShape, fmt: QuantFormat, scope: Scope, pp: int = 1
) -> list[TargetTensor]:
    """Targets of the first or the last of `pp` stages that belong to no layer."""
    assert scope is not Scope.LAYER
    return [
        target
        for rule in _rules(shape, scope, pp)
        for target in _targets(rule, shape, _outer_format(rule, fmt), {})
    ]


def _outer_format(rule: WeightRule, fmt: QuantFormat) -> QuantFormat:
    """Outside the layers everything is plain, but for a head that is named among the exceptions."""
    named = dict(fmt.exceptions) if rule.tied_sources else {}
    return named.get(rule.sources[0].name, FORMATS["fp16"])


def layer_targets(
    shape: ModelShape, fmt: QuantFormat, layer: int, local_layer: int
) -> list[TargetTensor]:
    """Targets of one layer. Their names count from the first layer of the stage: `local_layer`."""
    numbers = {"source": layer, "target": local_layer}
    targets = [
        target
        for rule in _rules(shape, Scope.LAYER)
        for target in _targets(
            rule,
            shape,
            format_of(rule, shape, fmt, layer),
            numbers,
            conv1d=fmt.quant_algo is None,
        )
    ]
    if fmt.kv_cache != "fp16":
        targets.append(_kv_cache_target(shape, fmt.kv_cache, numbers))
    return targets


def format_of(rule: WeightRule, shape: ModelShape, fmt: QuantFormat, layer: int) -> QuantFormat:
    """The one format of all linears that a rule joins; of one without linears, `fmt` itself."""
    if not (rule.quantized and fmt.exceptions):
        return fmt
    found = dict.fromkeys(fmt.of(name) for name in rule_linears(rule, shape, layer))
    assert len(found) == 1, f"{rule.target}: {[one.name for one in found]}; see split_problems"
    return next(iter(found))


def split_problems(shape: ModelShape, fmt: QuantFormat) -> list[Problem]:
    """Linears that become one, but have different formats; exceptions that name no linear."""
    problems = []
    known: set[str] = {head_rule(shape).sources[0].name}
    for layer in range(shape.num_layers if fmt.exceptions else 0):
        for group in fused_groups(shape, layer):
            known.update(group)
            names = sorted({fmt.of(name).name for name in group})
            if len(names) > 1 or len({fmt.of(name) for name in group}) > 1:
                what = f"is one linear in TensorRT-LLM, but is stored as {' and '.join(names)}"
                shown = ", ".join(group[:3]) + (", ..." if len(group) > 3 else "")
                problems.append(Problem(shown, what, fix="give all of them one format"))
    problems += [
        Problem(name, f"has a format, but {shape.architecture} has no such linear")
        for name, _ in fmt.exceptions
        if name not in known
    ]
    return problems


def _kv_cache_target(shape: ModelShape, kv_cache: KvCache, numbers: dict[str, int]) -> TargetTensor:
    """One scale for keys and values, which every rank has.

    The unified layout keeps one for each beside the projections; the tensors are called k_proj and
    v_proj there whatever the architecture calls them (ModelOpt 0.47). TensorRT-LLM takes the larger. Of
    fp8, ModelOpt's exporter makes none below 1, so that what fp8 can hold is stored as it is.
    """
    dense = next(
        rule for rule in _rules(shape, Scope.LAYER) if rule.target.endswith(".attention.dense")
    )
    attention, _, _ = dense.sources[0].name.format(layer=numbers["source"]).rpartition(".")
    return TargetTensor(
        name=f"{LAYER}.attention.kv_cache_scaling_factor".format(layer=numbers["target"]),
        dtype="F32",
        sources=tuple(
            SourceTensor(f"{attention}.{one}_proj.{one}_scale", ("F32",), (), True, f"{one}_scale")
            for one in ("k", "v")
        ),
        joined=False,
        fill=None,
        at_least=1.0 if kv_cache == "fp8" else 0.0,
    )


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


def planned_sizes(shape: ModelShape, fmt: QuantFormat, ranks: Iterable[Mapping]) -> Iterator[int]:
    """`planned_bytes` of each rank; those of a stage in a row share the work."""
    for (pp, pp_rank), stage in groupby(ranks, lambda mapping: (mapping.pp, mapping.pp_rank)):
        targets = list(stage_targets(shape, fmt, pp, pp_rank))
        for mapping in stage:
            yield file_bytes(target.spec(mapping) for target in targets)


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
        problems += _tp_problems(shape, fmt, tp, moe_ep)
    if pp > 1 and fmt.exceptions and not problems and pp <= shape.num_layers:
        problems += _stage_problems(shape, fmt, pp)
    if pp > shape.num_layers:
        what = f"the model has only {shape.num_layers} layers"
        problems.append(Problem(f"pp={pp}", what, f"pp 1 to {shape.num_layers}"))
    return problems


def _tp_problems(shape: ModelShape, fmt: QuantFormat, tp: int, moe_ep: int) -> list[Problem]:
    reasons = _cut_problems(shape, fmt, tp, moe_ep)
    if not reasons:
        return []
    choices = [
        str(n) for n in _TP_CHOICES if n % moe_ep == 0 and not _cut_problems(shape, fmt, n, moe_ep)
    ]
    fix = nearest_choices(shape, fmt, tp, _cut_problems)
    return [Problem(f"tp={tp}", what, f"tp {', '.join(choices)}", fix) for what in reasons]


def local_formats(shape: ModelShape, fmt: QuantFormat, pp: int) -> list[dict[str, QuantFormat]]:
    """For each local layer, `layer_formats` of it; `mapping_problems` must be empty."""
    stages = [layers_of_stage(shape.num_layers, pp, pp_rank) for pp_rank in range(pp)]
    return [layer_formats(shape, fmt, layer) for layer in max(stages, key=len)]


def _stage_problems(shape: ModelShape, fmt: QuantFormat, pp: int) -> list[Problem]:
    """TensorRT-LLM names the formats of linears by local layer, the same list for all stages."""
    first: dict[int, tuple[int, dict[str, QuantFormat]]] = {}
    for pp_rank in range(pp):
        for local, layer in enumerate(layers_of_stage(shape.num_layers, pp, pp_rank)):
            formats = layer_formats(shape, fmt, layer)
            other, expected = first.setdefault(local, (layer, formats))
            if formats != expected:
                what = (
                    f"layers {other} and {layer} are both layer {local} of a stage, and have "
                    "different formats; TensorRT-LLM counts layers from the first of a stage, so its "
                    "config cannot tell them apart"
                )
                fix = "pp: 1, or the same formats at the same place of every stage"
                return [Problem(f"pp={pp}", what, fix=fix)]
    return []


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
        *_different_targets(shape, fmt),
        *scope_targets(shape, fmt, Scope.LAST),
    ]
    dims = dict.fromkeys(
        dim for target in targets for source in target.sources for dim in source.dims
    )
    reasons = (why_not(dim, tp // moe_ep if dim.axis is Axis.EXPERT_FFN else tp) for dim in dims)
    return [reason for reason in reasons if reason] + _run_problems(shape, fmt)


def _run_problems(shape: ModelShape, fmt: QuantFormat) -> list[str]:
    """Fused linears whose heads do not end where a stored row ends: packed rows come in pairs."""
    divisors = {
        one.divisor(dim)
        for one in fmt.parts
        for stored in one.tensors
        for dim in stored.dims or ()
        if dim.parent == 0
    }
    found = {
        axis: _run_rows(source.fused, axis, shape)
        for rule in _rules(shape, Scope.LAYER)
        if rule.quantized
        for source in rule.sources
        if source.fused
        for axis in source.fused.parts
    }
    return [
        f"{axis.value}: {rows} consecutive rows of a fused linear are not a multiple of {divisor}"
        for axis, rows in found.items()
        for divisor in divisors
        if rows % divisor
    ]


def layer_formats(shape: ModelShape, fmt: QuantFormat, layer: int) -> dict[str, QuantFormat]:
    """Format of each quantized target of a layer, by its name within the layer: "attention.qkv"."""
    return {
        rule.target.removeprefix(f"{LAYER}."): format_of(rule, shape, fmt, layer).usual
        for rule in _rules(shape, Scope.LAYER)
        if rule.quantized
    }


def _different_targets(shape: ModelShape, fmt: QuantFormat) -> Iterator[TargetTensor]:
    """Targets of a layer, in each format that one of the layers has there."""
    for rule in _rules(shape, Scope.LAYER):
        layers = range(shape.num_layers if rule.quantized and fmt.exceptions else 1)
        for one in dict.fromkeys(format_of(rule, shape, fmt, layer) for layer in layers):
            yield from _targets(rule, shape, one, {"source": 0, "target": 0})


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
    rule: WeightRule,
    shape: ModelShape,
    fmt: QuantFormat,
    layers: dict[str, int],
    conv1d: bool = True,
) -> Iterator[TargetTensor]:
    """What one rule writes.

    Args:
        layers: numbers the {layer} of source and target names.
        conv1d: weights that the architecture keeps as [in, out] are stored so. In a quantized
            checkpoint they are not, quantized or left plain: ModelOpt, AutoAWQ and GPTQ put an ordinary
            linear in the place of GPT-2's Conv1D.
    """
    target_name = rule.target.format(layer=layers.get("target"))
    plain = tuple(
        replace(stored, source=rule.suffix, target=rule.suffix, target_dtype=rule.dtype)
        for stored in PLAIN
    )
    sources_as_stored = [
        replace(source, transposed=source.transposed and conv1d)
        for source in rule.sources_for(shape)
    ]
    for stored in fmt.tensors if rule.quantized or _is_coded(rule, fmt) else plain:
        sources = tuple(
            _source(rule, source, stored, shape, fmt, {"layer": layers.get("source"), **expert})
            for expert in _experts(rule, shape)
            for source in sources_as_stored
        )
        yield TargetTensor(
            name=f"{target_name}.{stored.target}",
            dtype=stored.target_dtype,
            sources=sources,
            joined=_follows_rows(stored),
            fill=stored.fill,
            at_least=0.0 if stored.largest else None,
            num_experts=shape.num_experts if rule.experts and stored.per_expert else 0,
        )


def _is_coded(rule: WeightRule, fmt: QuantFormat) -> bool:
    """Of a rule outside the layers: whether `_outer_format` found a format for it."""
    return bool(rule.tied_sources) and fmt.quant_algo is not None


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
    linear = source.name.format(**numbers)
    return SourceTensor(
        name=f"{linear}.{stored.source}",
        dtypes=stored.source_dtypes,
        dims=dims,
        required=stored.fill is None,
        kind=f"{rule.target}.{stored.target}",
        transposed=source.transposed,
        runs=_runs(source.fused, shape, dims[0].divisor) if source.fused and has_rows else None,
        offset=source.offset,
        scale=f"{linear}.{stored.scaled_by}" if stored.scaled_by else "",
    )


def _runs(fused: Fused, shape: ModelShape, divisor: int) -> RowRuns:
    groups = shape.num_kv_heads if fused.per_kv_head else 1
    sizes = [_run_rows(fused, axis, shape) // divisor for axis in fused.parts]
    return RowRuns(groups, sum(sizes), sum(sizes[: fused.index]), sizes[fused.index])


def _run_rows(fused: Fused, axis: Axis, shape: ModelShape) -> int:
    """Rows of one part that lie together."""
    groups = shape.num_kv_heads if fused.per_kv_head else 1
    return shape.extent(axis).size // groups
