"""What can be known before a build starts: problems, sizes and memory. Headers only, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint import mapping_problems, read_config
from pipeline.checkpoint.layout import planned_sizes
from pipeline.checkpoint.padding import padded_shape
from pipeline.checkpoint.source import Declared, open_files
from pipeline.checkpoint.trtllm_config import trtllm_config
from pipeline.config import HubSource, LoadedConfig
from pipeline.engine import BACKENDS
from pipeline.errors import CheckpointError, PipelineError, PlanError, Problem
from pipeline.models import ARCHITECTURES, ModelShape, shape_from_hf
from pipeline.models.upstream import upstream_notes
from pipeline.parallel import Mapping, mappings
from pipeline.quant.choose import MAX_BUDGET, budget_bits, model_format, split_groups
from pipeline.quant.formats import FORMATS, MIXED, KvCache, QuantFormat
from pipeline.quant.preflight import dtype_problems
from pipeline.quant.source import missing_tokenizer, open_original, open_plain_checkpoint
from pipeline.stages.build import build_limits
from pipeline.stages.fetch import local_directory, no_checkpoint
from pipeline.stages.quantize_problems import (
    calibration_problems,
    keep_problems,
    kv_cache_problems,
    mix_problems,
    quantize_problems,
    tensorrt_llm_notes,
)
from pipeline.stages.source_format import SourceFormat, format_problems
from pipeline.stages.texts import comparison_notes, text_problems
from pipeline.targets import TARGETS
from pipeline.weights import model_shape_fields

_KV_BYTES = {"fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Forecast:
    """Sizes of a build, in bytes.

    Attributes:
        source_bytes: tensors of the original checkpoint; None before it is fetched.
        rank_bytes: TensorRT-LLM checkpoint file of each rank.
        kv_bytes_per_token: KV cache of one token on the fullest rank.
        kv_bytes: KV cache of one rank for the configured batch and length.
        target_bytes: memory of the target GPU.
        exact: whether rank_bytes are; otherwise formats are still to be chosen, and they follow from
            the budget.
        kv_cache: what the cache holds.
    """

    shape: ModelShape
    source_bytes: int | None
    rank_bytes: tuple[int, ...]
    kv_bytes_per_token: int
    kv_bytes: int
    target_bytes: int
    exact: bool = True
    kv_cache: KvCache = "fp16"

    @property
    def free_bytes(self) -> int:
        """Target memory that weights and KV cache leave on the fullest rank; negative: does not fit.

        The checkpoint's fp32 scales become fp16 in the engine, so this is a little pessimistic.
        """
        return self.target_bytes - max(self.rank_bytes) - self.kv_bytes


@dataclass(frozen=True)
class Preflight:
    """Everything that headers and tables show.

    Attributes:
        config_problems: the YAML asks for something impossible.
        checkpoint_problems: weights, tokenizer or config.json are not what they should be.
        forecast: None when the model's shape is not known, cannot be cut as asked, or does not exist
            in the format.
        notes: what is legal, and may surprise.
    """

    config_problems: tuple[Problem, ...]
    checkpoint_problems: tuple[Problem, ...]
    forecast: Forecast | None
    notes: tuple[str, ...] = ()


def check(loaded: LoadedConfig, source_dir: Path | None, source: SourceFormat) -> Preflight:
    """Check config, model and weights against each other.

    Args:
        source_dir: the original checkpoint where it can be read already; None before a download.
        source: what is known of its format.
    """
    problems = []
    declared = source.declared
    if not loaded.converts_only:
        problems += [*_rank_problems(loaded), *_target_problems(loaded, declared)]
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
    # Any linear may become int4 while formats are not chosen yet.
    cut = _int4(loaded) if to_choose else fmt
    # A format that the architecture does not have has no layout, so nothing to cut or weigh.
    exists = fmt.name in ARCHITECTURES[shape.architecture].formats
    if exists and loaded.config.mapping.pad_ffn:
        shape = padded_shape(shape, cut, loaded.config.mapping.tp)
    cuts = list(_cut_problems(loaded, shape, cut)) if exists else []
    problems += [*_shape_problems(loaded, shape, fmt, source, exists), *cuts]
    weights: tuple[Problem, ...] = ()
    if source_dir is not None:
        quantize = exists and declared is None and fmt.name != "fp16"
        weights = tuple(_weight_problems(source_dir, declared, quantize))
    forecast = None
    if exists and not cuts:
        forecast = _forecast(loaded, shape, fmt, source_dir, to_choose)
    if forecast is not None:
        problems += _memory_problems(loaded, forecast)
    problems += text_problems(loaded, source_dir)
    notes = (*_notes(loaded, shape, fmt), *comparison_notes(loaded))
    return Preflight(tuple(problems), weights, forecast, notes)


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
    yield from kv_cache_problems(loaded, fmt)
    if not loaded.converts_only:
        yield from _length_problems(loaded, shape)
        yield from _head_problems(loaded, shape)


def _cut_problems(loaded: LoadedConfig, shape: ModelShape, fmt: QuantFormat) -> Iterator[Problem]:
    mapping = loaded.config.mapping
    for problem in mapping_problems(shape, fmt, mapping.tp, mapping.pp, mapping.moe_ep):
        yield _at_its_key(loaded, problem)


def _notes(loaded: LoadedConfig, shape: ModelShape, fmt: QuantFormat) -> Iterator[str]:
    yield from tensorrt_llm_notes(loaded, fmt)
    if loaded.converts_only:
        mapping = loaded.config.mapping
        config = trtllm_config(shape, FORMATS["fp16"], tp=mapping.tp, pp=mapping.pp)
        yield from upstream_notes(config)
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


def _memory_problems(loaded: LoadedConfig, forecast: Forecast) -> Iterator[Problem]:
    """Only of an engine that is compiled for the target: the CPU network runs on any host."""
    if loaded.config.build.backend != "tensorrt_rtx" or forecast.free_bytes >= 0:
        return
    needed = forecast.target_bytes - forecast.free_bytes
    room = forecast.target_bytes - max(forecast.rank_bytes)
    tokens = room // forecast.kv_bytes_per_token
    yield Problem(
        loaded.where("target"),
        f"weights and KV cache need {needed / 1e9:.2f} GB, the target has "
        f"{forecast.target_bytes / 1e9:.2f} GB",
        fix=f"max_batch_size x max_seq_len of at most {tokens} tokens fit beside the weights"
        if tokens > 0
        else "the weights alone do not fit: another format, or a larger target",
    )


def _shape_is_unknown(loaded: LoadedConfig) -> bool:
    model = loaded.config.model
    return isinstance(model, HubSource) and model.shape is None


def _forecast(
    loaded: LoadedConfig,
    shape: ModelShape,
    fmt: QuantFormat,
    source_dir: Path | None,
    to_choose: bool,
) -> Forecast:
    config = loaded.config
    mapping = config.mapping
    ranks = mappings(mapping.tp, mapping.pp, mapping.moe_ep)
    # KV heads are repeated when there are fewer than ranks; the first stage has the most layers.
    heads = max(1, shape.num_kv_heads // mapping.tp)
    layers = math.ceil(shape.num_layers / mapping.pp)
    per_token = 2 * layers * heads * shape.head_size * _KV_BYTES[fmt.kv_cache]
    return Forecast(
        shape=shape,
        source_bytes=_source_bytes(source_dir),
        rank_bytes=_rank_bytes(loaded, shape, fmt, ranks, to_choose),
        exact=not to_choose,
        kv_cache=fmt.kv_cache,
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * config.build.max_batch_size * config.build.max_seq_len,
        target_bytes=TARGETS[config.target].memory_bytes,
    )


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
    )


def _is_to_choose(loaded: LoadedConfig, declared: Declared | None) -> bool:
    """Whether the quantize stage chooses the format of each linear."""
    return loaded.config.quantize.format == MIXED and declared is None


def _int4(loaded: LoadedConfig) -> QuantFormat:
    return FORMATS["int4_awq"].with_group_size(loaded.config.quantize.group_size)


def _rank_bytes(
    loaded: LoadedConfig,
    shape: ModelShape,
    fmt: QuantFormat,
    ranks: Sequence[Mapping],
    to_choose: bool,
) -> tuple[int, ...]:
    """Exact, or what a budget leaves of the linears' float16 weights."""
    sizes = tuple(planned_sizes(shape, fmt, ranks))
    if not to_choose:
        return sizes
    bits = budget_bits(loaded.config.quantize.budget or "") or MAX_BUDGET
    halved = planned_sizes(shape, FORMATS["fp8"], ranks)  # one byte less for each weight
    return tuple(
        size - round((size - half) * (MAX_BUDGET - bits) / 8)
        for size, half in zip(sizes, halved, strict=True)
    )


def _source_bytes(source_dir: Path | None) -> int | None:
    if source_dir is None:
        return None
    try:
        return sum(info.nbytes for info in open_files(source_dir).tensors.values())
    except PipelineError:  # listed by `_weight_problems`
        return None


def _rank_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    for name in ("tp", "pp"):
        size = getattr(loaded.config.mapping, name)
        if size != 1:
            yield Problem(
                loaded.where("mapping", name),
                f"{size} ranks: engines of more than one rank are not built yet",
                allowed="1",
                fix="build.backend: none converts the checkpoint for this mapping and stops there",
            )


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


def _length_problems(loaded: LoadedConfig, shape: ModelShape) -> Iterator[Problem]:
    config = loaded.config
    limit = shape.max_position_embeddings
    for keys, value in (
        (("build", "max_seq_len"), config.build.max_seq_len),
        (("verify", "seq_len"), config.verify.seq_len),
    ):
        if value > limit:
            what = f"{value} is more than the model's max_position_embeddings"
            yield Problem(loaded.where(*keys), what, allowed=f"at most {limit}")
    if config.verify.seq_len > config.build.max_seq_len:
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
