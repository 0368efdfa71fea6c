"""Where architecture, format and mapping meet: every tensor of a rank, and what it is made of.

Works from a ModelShape alone, without weights; convert, plan and the synthetic writer all use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.checkpoint.writer import TensorSpec, file_bytes
from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, ModelShape, Scope, Source, WeightRule
from pipeline.parallel import Dim, Mapping, layers_of_stage, part, why_not
from pipeline.quant.formats import GROUP_SIZES, PLAIN, QuantFormat, StoredTensor

_TP_CHOICES = range(1, 17)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the Hugging Face checkpoint; `dims` are those of the whole stored tensor.

    Attributes:
        dtypes: safetensors dtypes that can be read.
        required: False when the format has a neutral value for it.
        kind: the rule and tensor that it belongs to: the same in every layer and for fused sources.
    """

    name: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    required: bool
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return tuple(dim.size for dim in self.dims)


@dataclass(frozen=True)
class TargetTensor:
    """A tensor of a TensorRT-LLM rank file.

    Attributes:
        sources: joined along dimension 0 if `joined`, otherwise they must all be the same tensor.
        fill: written when none of the sources exist; None: they are required.
    """

    name: str
    dtype: str
    sources: tuple[SourceTensor, ...]
    joined: bool
    fill: float | None

    def spec(self, mapping: Mapping) -> TensorSpec:
        """Its shape on one rank."""
        first = self.sources[0]
        shape = [part(dim, mapping).size for dim in first.dims]
        if self.joined:
            shape[0] = sum(part(source.dims[0], mapping).size for source in self.sources)
        return TensorSpec(self.name, self.dtype, tuple(shape))


def scope_targets(shape: ModelShape, fmt: QuantFormat, scope: Scope) -> list[TargetTensor]:
    """Targets of the first or the last stage that belong to no layer."""
    assert scope is not Scope.LAYER
    return [target for rule in _rules(shape, scope) for target in _targets(rule, shape, fmt, {})]


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
        yield from scope_targets(shape, fmt, Scope.FIRST)
    for local_layer, layer in enumerate(layers_of_stage(shape.num_layers, pp, pp_rank)):
        yield from layer_targets(shape, fmt, layer, local_layer)
    if pp_rank == pp - 1:
        yield from scope_targets(shape, fmt, Scope.LAST)


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


def mapping_problems(shape: ModelShape, fmt: QuantFormat, tp: int, pp: int) -> list[Problem]:
    """Why this model cannot be stored in this format or cut this way, with the legal choices."""
    problems = []
    whole = _cut_problems(shape, fmt, tp=1)
    if whole:
        fits = [str(size) for size in GROUP_SIZES if _fits_group_size(shape, fmt, size)]
        allowed = f"group_size {' or '.join(fits)}" if fits else ""
        problems += [Problem(f"format {fmt.name}", what, allowed) for what in whole]
    else:
        choices = [str(n) for n in _TP_CHOICES if not _cut_problems(shape, fmt, n)]
        allowed = f"tp {', '.join(choices)}"
        problems += [Problem(f"tp={tp}", what, allowed) for what in _cut_problems(shape, fmt, tp)]
    if pp > shape.num_layers:
        what = f"the model has only {shape.num_layers} layers"
        problems.append(Problem(f"pp={pp}", what, f"pp 1 to {shape.num_layers}"))
    return problems


def _cut_problems(shape: ModelShape, fmt: QuantFormat, tp: int) -> list[str]:
    targets = [
        *scope_targets(shape, fmt, Scope.FIRST),
        *layer_targets(shape, fmt, layer=0, local_layer=0),
        *scope_targets(shape, fmt, Scope.LAST),
    ]
    dims = dict.fromkeys(
        dim for target in targets for source in target.sources for dim in source.dims
    )
    return [reason for dim in dims if (reason := why_not(dim, tp))]


def _fits_group_size(shape: ModelShape, fmt: QuantFormat, group_size: int) -> bool:
    if fmt.group_size is None:
        return False
    return not _cut_problems(shape, fmt.with_group_size(group_size), tp=1)


def _rules(shape: ModelShape, scope: Scope) -> list[WeightRule]:
    return [rule for rule in ARCHITECTURES[shape.architecture].rules if rule.scope is scope]


def _targets(
    rule: WeightRule, shape: ModelShape, fmt: QuantFormat, layers: dict[str, int]
) -> Iterator[TargetTensor]:
    """What one rule writes; `layers` numbers the {layer} of source and target names."""
    target_name = rule.target.format(layer=layers.get("target"))
    for stored in fmt.tensors if rule.quantized else PLAIN:
        sources = tuple(
            _source(rule, source, stored, shape, fmt, layers.get("source"))
            for source in rule.sources_for(shape)
        )
        yield TargetTensor(
            name=f"{target_name}.{stored.target}",
            dtype=stored.target_dtype,
            sources=sources,
            joined=stored.dims is None or stored.dims[0].parent == 0,
            fill=stored.fill,
        )


def _source(
    rule: WeightRule,
    source: Source,
    stored: StoredTensor,
    shape: ModelShape,
    fmt: QuantFormat,
    layer: int | None,
) -> SourceTensor:
    if stored.dims is None:
        dims = tuple(Dim(axis, shape.extent(axis)) for axis in source.axes)
    else:
        dims = tuple(
            Dim(source.axes[dim.parent], shape.extent(source.axes[dim.parent]), fmt.divisor(dim))
            for dim in stored.dims
        )
    return SourceTensor(
        name=f"{source.name.format(layer=layer)}.{stored.source}",
        dtypes=stored.source_dtypes,
        dims=dims,
        required=stored.fill is None,
        kind=f"{rule.target}.{stored.target}",
    )
