"""What can be known before a build starts: problems, sizes and memory. Headers only, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint import read_config
from pipeline.checkpoint.padding import padded_shape
from pipeline.checkpoint.source import Declared, open_files
from pipeline.checkpoint.trtllm_config import trtllm_config
from pipeline.config import HubSource, LoadedConfig
from pipeline.engine import BACKENDS
from pipeline.engine.tensorrt_rtx import ALSO_FOR, target_problems
from pipeline.errors import CheckpointError, PipelineError, PlanError, Problem
from pipeline.forecast.changes import Change, change_text, nearest_changes
from pipeline.forecast.from_config import Forecast, forecast, subject_of
from pipeline.forecast.sizes_text import exact_text
from pipeline.forecast.subject import cut_problems
from pipeline.models import ARCHITECTURES, ModelShape, shape_from_hf
from pipeline.models.upstream import upstream_notes
from pipeline.quant.backends import TENSORRT_LLM, TENSORRT_RTX
from pipeline.quant.choose import model_format, split_groups
from pipeline.quant.formats import FORMATS, MIXED, QuantFormat
from pipeline.quant.preflight import dtype_problems
from pipeline.quant.source import missing_tokenizer, open_original, open_plain_checkpoint
from pipeline.stages.build import build_limits
from pipeline.stages.build_tools import trtllm_notes, trtllm_problems, trtllm_subject
from pipeline.stages.fetch import local_directory, no_checkpoint
from pipeline.stages.quantize_problems import (
    calibration_problems,
    keep_problems,
    kv_cache_problems,
    lm_head_problems,
    mix_problems,
    quantize_problems,
    tensorrt_llm_notes,
)
from pipeline.stages.source_format import SourceFormat, format_problems
from pipeline.stages.texts import comparison_notes, text_problems
from pipeline.targets import TARGETS
from pipeline.weights import model_shape_fields

_SHOWN = 3
"""Nearest changes that an error names."""


@dataclass(frozen=True)
class Preflight:
    """Everything that headers and tables show.

    Attributes:
        config_problems: the YAML asks for something impossible.
        checkpoint_problems: weights, tokenizer or config.json are not what they should be.
        forecast: None when the model's shape is not known, cannot be cut as asked, or does not exist
            in the format.
        notes: what is legal, and may surprise.
        changes: the nearest builds that are possible, where this one is not.
    """

    config_problems: tuple[Problem, ...]
    checkpoint_problems: tuple[Problem, ...]
    forecast: Forecast | None
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()


def check(loaded: LoadedConfig, source_dir: Path | None, source: SourceFormat) -> Preflight:
    """Check config, model and weights against each other.

    Args:
        source_dir: the original checkpoint where it can be read already; None before a download.
        source: what is known of its format.
    """
    problems: list[Problem] = []
    declared = source.declared
    if not loaded.converts_only:
        problems += _target_problems(loaded, declared)
    local = local_directory(loaded)
    if local is not None and not (local / "config.json").is_file():
        return Preflight(tuple(problems), (no_checkpoint(local),), None)
    if source_dir is None and _shape_is_unknown(loaded):
        return Preflight(tuple(problems), (), None)  # checked again after the download
    try:
        fields = model_shape_fields(loaded) if source_dir is None else read_config(source_dir)
        shape = shape_from_hf(fields)
        source.raise_problems()
    except CheckpointError as error:
        return Preflight(tuple(problems), error.problems, None)
    except PlanError as error:
        return Preflight((*problems, *error.problems), (), None)
    fmt, to_choose = _format(loaded, shape, declared), _is_to_choose(loaded, declared)
    # A format that the architecture does not have has no layout, so nothing to cut or weigh.
    exists = fmt.name in ARCHITECTURES[shape.architecture].formats
    subject = subject_of(loaded, shape, fmt, not to_choose)
    if exists and loaded.config.mapping.pad_ffn:
        shape = padded_shape(shape, subject.cut_format, subject.tp)
        subject = replace(subject, shape=shape)
    cuts = [_at_its_key(loaded, problem) for problem in cut_problems(subject)] if exists else []
    problems += [*_shape_problems(loaded, shape, fmt, source, exists), *cuts]
    weights: tuple[Problem, ...] = ()
    if source_dir is not None:
        quantize = exists and declared is None and fmt.name != "fp16"
        weights = tuple(_weight_problems(source_dir, declared, quantize))
    found: Forecast | None = None
    changes: tuple[Change, ...] = ()
    is_quantized = declared is not None
    if exists and cuts:
        changes = nearest_changes(subject, formats=not is_quantized)
    elif exists:
        found = forecast(subject, _source_bytes(source_dir), quantized=is_quantized)
        changes = found.changes
        problems += _memory_problems(loaded, found)
    problems += text_problems(loaded, source_dir)
    notes = (*_notes(loaded, shape, fmt), *comparison_notes(loaded))
    return Preflight(tuple(problems), weights, found, notes, changes)


def _shape_problems(
    loaded: LoadedConfig,
    shape: ModelShape,
    fmt: QuantFormat,
    source: SourceFormat,
    exists: bool,
) -> Iterator[Problem]:
    """What the YAML asks of a model of this shape; `exists`: the architecture has the format."""
    yield from format_problems(loaded, source, shape.architecture)
    if source.declared is None and exists:
        yield from quantize_problems(loaded)
        yield from calibration_problems(loaded, shape)
        yield from keep_problems(loaded, shape)
        yield from mix_problems(loaded, shape)
        yield from lm_head_problems(loaded, shape)
    yield from kv_cache_problems(loaded, fmt)
    if not loaded.converts_only:
        yield from _length_problems(loaded, shape)
        yield from _head_problems(loaded, shape)
    if loaded.config.build.backend == TENSORRT_LLM:
        yield from trtllm_problems(loaded, trtllm_subject(loaded, shape, fmt), shape.num_layers)


def _notes(loaded: LoadedConfig, shape: ModelShape, fmt: QuantFormat) -> Iterator[str]:
    yield from tensorrt_llm_notes(loaded, fmt)
    if loaded.config.build.backend == TENSORRT_LLM:
        yield from trtllm_notes(loaded, trtllm_subject(loaded, shape, fmt))
    if not loaded.has_network:
        mapping = loaded.config.mapping
        config = trtllm_config(shape, FORMATS["fp16"], tp=mapping.tp, pp=mapping.pp)
        yield from upstream_notes(config)
    elif loaded.config.mapping.world_size > 1:
        yield (
            f"{loaded.config.mapping.world_size} ranks: no Triton model repository is made; it would "
            "serve from the CPU, which runs one rank"
        )
    scaling, max_seq_len = shape.rotary_scaling, loaded.config.build.max_seq_len
    if scaling is None or scaling.kind != "longrope":
        return
    original = scaling.original_max_position_embeddings
    assert original is not None
    if max_seq_len > original:
        yield (
            f"longrope: build.max_seq_len {max_seq_len} is above original_max_position_embeddings "
            f"{original}, so the engine uses the long factors for every prompt; transformers uses the "
            f"short ones up to {original} tokens. Short prompts get other logits than there; with "
            f"max_seq_len {original} they agree"
        )


def _memory_problems(loaded: LoadedConfig, found: Forecast) -> Iterator[Problem]:
    """Only of an engine that is compiled for the target: the CPU network runs on any host."""
    rank, build = found.fullest, loaded.config.build
    if build.backend in ("onnxruntime", "none") or rank.verdict != "does not fit":
        return
    needed = rank.capacity - rank.certain_left
    what = "weights" if rank.has_paged_cache else "weights and KV cache"
    changes = [f"{change.what} ({change_text(change)})" for change in found.changes[:_SHOWN]]
    yield Problem(
        loaded.where("target"),
        f"rank {rank.rank}: {what} need {exact_text(needed)}, the target has "
        f"{exact_text(rank.capacity)}",
        fix=" or ".join(changes) or "no single change makes it fit: a smaller model",
    )


def _shape_is_unknown(loaded: LoadedConfig) -> bool:
    model = loaded.config.model
    return isinstance(model, HubSource) and model.shape is None


def _format(loaded: LoadedConfig, shape: ModelShape, declared: Declared | None) -> QuantFormat:
    """Of the engine: what a quantized source has, else what the YAML asks for."""
    if declared is not None:
        return declared.format
    quantize = loaded.config.quantize
    if quantize.format == "fp16":
        return FORMATS["fp16"]
    return model_format(
        shape,
        format=quantize.format,
        group_size=quantize.group_size,
        kv_cache=quantize.kv_cache,
        # What splits a group is a problem of its own, and has no layout.
        keep=() if split_groups(shape, quantize.keep) else quantize.keep,
        lm_head=quantize.lm_head,
    )


def _is_to_choose(loaded: LoadedConfig, declared: Declared | None) -> bool:
    """Whether the quantize stage chooses the format of each linear."""
    return loaded.config.quantize.format == MIXED and declared is None


def _source_bytes(source_dir: Path | None) -> int | None:
    if source_dir is None:
        return None
    try:
        return sum(info.nbytes for info in open_files(source_dir).tensors.values())
    except PipelineError:  # listed by `_weight_problems`
        return None


def _target_problems(loaded: LoadedConfig, declared: Declared | None) -> Iterator[Problem]:
    backend = BACKENDS[loaded.config.build.backend]
    formats: list[str] = [loaded.config.quantize.format]
    if declared is not None:
        formats = [part.name for part in declared.format.parts]
    problem = backend.can_target(TARGETS[loaded.config.target], formats)
    if problem is not None:
        yield replace(problem, where=loaded.where("target"))
    problem = backend.limits_problem(build_limits(loaded))
    if problem is not None:
        yield replace(problem, where=loaded.where("build"))
    yield from _further_target_problems(loaded, formats)


def _further_target_problems(loaded: LoadedConfig, formats: list[str]) -> Iterator[Problem]:
    """Of build.also_for."""
    names, where = loaded.config.build.also_for, loaded.where("build", "also_for")
    if names and loaded.config.build.backend != TENSORRT_RTX:
        what = f"an engine of backend {loaded.config.build.backend} is for one target"
        yield Problem(where, what, f"backend {TENSORRT_RTX}", "remove it, or one YAML per target")
        return
    for problem in target_problems(loaded.config.target, names, formats):
        if problem.where == ALSO_FOR:
            yield replace(problem, where=where)


def _length_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    config = loaded.written  # a rehearsal finds what would stop the build it stands for
    limit = shape.max_position_embeddings
    lengths = [(("build", "max_seq_len"), config.build.max_seq_len)]
    if loaded.has_network:
        lengths.append((("verify", "seq_len"), config.verify.seq_len))
    for keys, value in lengths:
        if value > limit:
            what = f"{value} is more than the model's max_position_embeddings"
            yield Problem(loaded.where(*keys), what, allowed=f"at most {limit}")
    if loaded.has_network and config.verify.seq_len > config.build.max_seq_len:
        what = f"{config.verify.seq_len} does not fit the engine"
        allowed = f"at most build.max_seq_len, {config.build.max_seq_len}"
        yield Problem(loaded.where("verify", "seq_len"), what, allowed)


def _head_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    problem = BACKENDS[loaded.config.build.backend].head_size_problem(shape.head_size)
    if problem is not None:
        yield replace(problem, where=loaded.where("build", "backend"))


def _at_its_key(loaded: LoadedConfig, problem: Problem) -> Problem:
    """A problem of format or mapping, at the line of the YAML that causes it."""
    keys = ("quantize", "group_size") if problem.where.startswith("format") else ("mapping",)
    return replace(problem, where=loaded.where(*keys))


def _weight_problems(
    source_dir: Path, declared: Declared | None, quantize: bool
) -> Iterator[Problem]:
    """`declared`: of a source that is quantized already; `quantize`: whether it will be."""
    tokenizer_problem = missing_tokenizer(source_dir) or _broken_tokenizer(source_dir)
    if tokenizer_problem is not None:
        yield tokenizer_problem
    try:
        open_source = open_plain_checkpoint if declared is None else open_original
        checkpoint = open_source(source_dir)
    except PipelineError as error:
        yield from error.problems
        return
    if quantize:
        yield from dtype_problems(checkpoint)


def _broken_tokenizer(source_dir: Path) -> Problem | None:
    """tokenizer.json that is no JSON object with a model; other kinds are left to their libraries."""
    path = source_dir / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        return Problem(str(path), f"is not JSON: {error}", fix="fetch it again")
    if isinstance(fields, dict) and "model" in fields:
        return None
    return Problem(str(path), "holds no tokenizer model", fix="fetch it again")
