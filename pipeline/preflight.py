"""What can be known before a build starts: problems, sizes and memory. Headers only, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint import mapping_problems, planned_bytes, read_config
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config import HubSource, LoadedConfig
from pipeline.engine import BACKENDS
from pipeline.errors import CheckpointError, PipelineError, PlanError, Problem
from pipeline.models import ModelShape, shape_from_hf
from pipeline.parallel import mappings
from pipeline.quant.calibration import load_texts
from pipeline.quant.formats import FORMATS, QuantFormat
from pipeline.quant.preflight import dtype_problems
from pipeline.quant.source import missing_tokenizer, open_plain_checkpoint
from pipeline.stages.build import build_limits
from pipeline.stages.fetch import local_directory, no_checkpoint
from pipeline.stages.texts import calibration_path, heldout_path
from pipeline.targets import TARGETS
from pipeline.weights import model_shape_fields

_KV_BYTES = 2  # the GPU's cache is fp16


@dataclass(frozen=True)
class Forecast:
    """Sizes of a build, in bytes; exact unless the name says otherwise.

    Attributes:
        source_bytes: tensors of the original checkpoint; None before it is fetched.
        rank_bytes: TensorRT-LLM checkpoint file of each rank.
        kv_bytes_per_token: KV cache of one token on the fullest rank, fp16.
        kv_bytes: KV cache of one rank for the configured batch and length.
        target_bytes: memory of the target GPU.
    """

    shape: ModelShape
    source_bytes: int | None
    rank_bytes: tuple[int, ...]
    kv_bytes_per_token: int
    kv_bytes: int
    target_bytes: int

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
        forecast: None when the model's shape is not known or cannot be cut as asked.
    """

    config_problems: tuple[Problem, ...]
    checkpoint_problems: tuple[Problem, ...]
    forecast: Forecast | None


def check(loaded: LoadedConfig, source_dir: Path | None) -> Preflight:
    """Check config, model and weights against each other.

    Args:
        source_dir: the original checkpoint where it can be read already; None before a download.
    """
    problems = [*_rank_problems(loaded), *_target_problems(loaded)]
    local = local_directory(loaded)
    if local is not None and not (local / "config.json").is_file():
        return Preflight(tuple(problems), (no_checkpoint(local),), None)
    if source_dir is None and _shape_is_unknown(loaded):
        return Preflight(tuple(problems), (), None)  # checked again after the download
    try:
        fields = model_shape_fields(loaded) if source_dir is None else read_config(source_dir)
        shape = shape_from_hf(fields)
    except CheckpointError as error:
        return Preflight(tuple(problems), error.problems, None)
    except PlanError as error:
        return Preflight((*problems, *error.problems), (), None)
    problems += _length_problems(loaded, shape)
    mapping = loaded.config.mapping
    cuts = mapping_problems(shape, _format(loaded), mapping.tp, mapping.pp)
    problems += [_at_its_key(loaded, problem) for problem in cuts]
    weights = (
        ()
        if source_dir is None
        else tuple(_weight_problems(source_dir, loaded.config.quantize.format != "fp16"))
    )
    forecast = None if cuts else _forecast(loaded, shape, source_dir)
    if forecast is not None:
        problems += _memory_problems(loaded, forecast)
    problems += _text_problems(loaded)
    return Preflight(tuple(problems), weights, forecast)


def _memory_problems(loaded: LoadedConfig, forecast: Forecast) -> Iterator[Problem]:
    """Only of an engine that is compiled for the target: the CPU network runs on any host."""
    if loaded.config.build.backend == "onnxruntime" or forecast.free_bytes >= 0:
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


def _text_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """Texts that cannot be read, before anything is calibrated or compared."""
    texts: dict[tuple[str, ...], Path] = {("verify", "data"): heldout_path(loaded)}
    if loaded.config.quantize.format != "fp16":
        texts["quantize", "calibration", "data"] = calibration_path(loaded)
    for keys, path in texts.items():
        if path.is_file():  # the plan lists missing files
            try:
                load_texts(path)
            except PipelineError as error:
                yield from (
                    replace(problem, where=f"{loaded.where(*keys)}: {problem.where}")
                    for problem in error.problems
                )


def _shape_is_unknown(loaded: LoadedConfig) -> bool:
    model = loaded.config.model
    return isinstance(model, HubSource) and model.shape is None


def _forecast(loaded: LoadedConfig, shape: ModelShape, source_dir: Path | None) -> Forecast:
    config = loaded.config
    mapping = config.mapping
    ranks = mappings(mapping.tp, mapping.pp)
    # KV heads are repeated when there are fewer than ranks; the first stage has the most layers.
    heads = max(1, shape.num_kv_heads // mapping.tp)
    layers = math.ceil(shape.num_layers / mapping.pp)
    per_token = 2 * layers * heads * shape.head_size * _KV_BYTES
    return Forecast(
        shape=shape,
        source_bytes=_source_bytes(source_dir),
        rank_bytes=tuple(planned_bytes(shape, _format(loaded), rank) for rank in ranks),
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * config.build.max_batch_size * config.build.max_seq_len,
        target_bytes=TARGETS[config.target].memory_bytes,
    )


def _format(loaded: LoadedConfig) -> QuantFormat:
    quantize = loaded.config.quantize
    fmt = FORMATS[quantize.format]
    return fmt if fmt.group_size is None else fmt.with_group_size(quantize.group_size)


def _source_bytes(source_dir: Path | None) -> int | None:
    if source_dir is None:
        return None
    try:
        return sum(info.nbytes for info in CheckpointReader(source_dir).tensors.values())
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
            )


def _target_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    backend = BACKENDS[loaded.config.build.backend]
    problem = backend.can_target(TARGETS[loaded.config.target], _format(loaded).quant_algo)
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
        (("quantize", "calibration", "seq_len"), config.quantize.calibration.seq_len),
    ):
        if value > limit:
            what = f"{value} is more than the model's max_position_embeddings"
            yield Problem(loaded.where(*keys), what, allowed=f"at most {limit}")
    if config.verify.seq_len > config.build.max_seq_len:
        what = f"{config.verify.seq_len} does not fit the engine"
        allowed = f"at most build.max_seq_len, {config.build.max_seq_len}"
        yield Problem(loaded.where("verify", "seq_len"), what, allowed)


def _at_its_key(loaded: LoadedConfig, problem: Problem) -> Problem:
    """A problem of format or mapping, at the line of the YAML that causes it."""
    keys = ("quantize", "group_size") if problem.where.startswith("format") else ("mapping",)
    return replace(problem, where=loaded.where(*keys))


def _weight_problems(source_dir: Path, quantized: bool) -> Iterator[Problem]:
    tokenizer_problem = missing_tokenizer(source_dir) or _broken_tokenizer(source_dir)
    if tokenizer_problem is not None:
        yield tokenizer_problem
    try:
        checkpoint = open_plain_checkpoint(source_dir)
    except PipelineError as error:
        yield from error.problems
        return
    if quantized:
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
