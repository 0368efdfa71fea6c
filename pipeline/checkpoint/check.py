"""Does a checkpoint hold exactly what its config promises? Headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pipeline.checkpoint.layout import SourceTensor, planned_sources
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, ModelShape
from pipeline.quant.formats import PLAIN, QuantFormat


def check_checkpoint(reader: TensorReader, shape: ModelShape, fmt: QuantFormat) -> list[Problem]:
    """Every tensor that is missing, unused, or of the wrong shape or dtype. Reads no data."""
    sources = planned_sources(shape, fmt)
    missing = _missing(reader, sources)
    problems = [_missing_problem(source, shape) for source in missing]
    for source in sources:
        if source.name in reader.tensors:
            problems += _mismatches(reader, source)
    known = {source.name for source in sources} | ignored_names(shape) | shadowed_names(shape)
    problems += [
        Problem(name, "not used by any rule", fix=f"check the architecture, {shape.architecture}")
        for name in reader.tensors
        if name not in known
    ]
    return problems


def shadowed_names(shape: ModelShape) -> set[str]:
    """Tensors that a tied model may carry although it uses another in their place (a copy of it)."""
    return {name for name, _ in tied_pairs(shape)}


def tied_pairs(shape: ModelShape) -> list[tuple[str, str]]:
    """(name, tied to) of weights that must be equal if a tied model carries both."""
    if not shape.tie_word_embeddings:
        return []
    suffix = PLAIN[0].source
    return [
        (f"{own.name}.{suffix}", f"{tied.name}.{suffix}")
        for rule in ARCHITECTURES[shape.architecture].rules
        for own, tied in zip(rule.sources, rule.tied_sources, strict=bool(rule.tied_sources))
    ]


def ignored_names(shape: ModelShape) -> set[str]:
    """Tensors that are left out on purpose."""
    return {
        name.format(layer=layer)
        for name in ARCHITECTURES[shape.architecture].ignored_sources
        for layer in range(shape.num_layers)
    }


def _missing(reader: TensorReader, sources: Iterable[SourceTensor]) -> list[SourceTensor]:
    """Required ones that are not there, and optional ones that only some layers or parts have."""
    listed = list(sources)
    kinds = Counter(source.kind for source in listed if source.name in reader.tensors)
    return [
        source
        for source in listed
        if source.name not in reader.tensors and (source.required or kinds[source.kind])
    ]


def _missing_problem(source: SourceTensor, shape: ModelShape) -> Problem:
    fix = ""
    if source.name.startswith("lm_head.") and not shape.tie_word_embeddings:
        fix = "if the model ties its embeddings, set tie_word_embeddings in config.json"
    what = "missing" if source.required else "missing, but its siblings have one"
    return Problem(source.name, what, f"{source.dtypes[0]} {list(source.shape)}", fix)


def _mismatches(reader: TensorReader, source: SourceTensor) -> list[Problem]:
    tensor = reader.tensors[source.name]
    problems = []
    if tensor.shape != source.shape:
        what = f"shape {list(tensor.shape)}"
        problems.append(Problem(source.name, what, f"{list(source.shape)}, from config.json"))
    if tensor.dtype not in source.dtypes:
        what = f"dtype {tensor.dtype}"
        problems.append(Problem(source.name, what, ", ".join(source.dtypes)))
    return problems
