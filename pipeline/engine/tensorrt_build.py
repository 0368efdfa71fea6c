"""The float16 graph -> TensorRT plan, with the parser, lowering and stream writer of TensorRT-RTX.

Not executed: it takes a GPU. tests/unit/test_tensorrt_calls.py compares every name that is used here
with the bindings.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.disk import not_written
from pipeline.engine.rtx_build import (
    compiler_logger,
    log_problems,
    parse_network,
    plan_writer,
    profile_shapes,
)
from pipeline.engine.rtx_log import CompilerLog
from pipeline.engine.rtx_lowering import lower_all_reduces, lower_attention
from pipeline.engine.tensorrt_request import PlanOptions
from pipeline.errors import Problem, StageError, ToolError
from pipeline.network.collectives import all_reduce_names
from pipeline.network.io_names import HIDDEN_STATES, INPUT_IDS, LOGIT_POSITIONS, POSITION_IDS
from pipeline.network.limits import BuildLimits
from pipeline.network.spec import NetworkSpec

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
"""Least, usual and most shape of an input."""
_TOKEN_AXIS = 1
_WITH_TOKENS = (INPUT_IDS, POSITION_IDS, HIDDEN_STATES)
_VERSION = re.compile(r"(\d+)\.(\d+)")
_KNOWN_MAJOR = 11
_COLLECTIVES = (10, 16)


def bindings() -> Any:
    """The module `tensorrt`, of a version that can build the network.

    Raises:
        ToolError: it is not installed, or of another version.
    """
    try:
        import tensorrt
    except ImportError as error:
        what = f"TensorRT cannot be loaded: {error}"
        raise ToolError(Problem("backend tensorrt", what, fix="pip install tensorrt")) from error
    problem = version_problem(str(tensorrt.__version__))
    if problem is not None:
        raise ToolError(problem)
    return tensorrt


def version_problem(version: str) -> Problem | None:
    """None, or what this version lacks.

    By the bindings: 10.14 has no KV cache update; 10.15 and 10.16 have one, but their attention knows
    neither lengths of rows (IAttention.key_value_lengths) nor a mask aligned to their end
    (CausalMaskKind), so an engine would attend to the whole cache; collectives begin with 10.16.
    """
    found = _VERSION.match(version)
    major, minor = (int(found[1]), int(found[2])) if found else (0, 0)
    if major == _KNOWN_MAJOR:
        return None
    if major > _KNOWN_MAJOR or not found:
        lack = "is not known to this program"
    elif (major, minor) >= (10, 15):
        lack = "has no attention with lengths of rows: it would attend to the whole KV cache"
        lack += "" if (major, minor) >= _COLLECTIVES else "; and no all-reduce"
    else:
        lack = "has no update of a KV cache, and no attention with lengths of rows"
    return Problem("backend tensorrt", f"TensorRT {version} {lack}", "11.x", "install TensorRT 11")


def build_plan(
    trt: Any,
    graph_path: Path,
    plan_path: Path,
    spec: NetworkSpec,
    limits: BuildLimits,
    options: PlanOptions,
    timing_cache: Path | None,
    log_path: Path,
) -> int | None:
    """Compile `graph_path` on the GPU of this machine into `plan_path`.

    Args:
        trt: the bindings.
        timing_cache: file of measured kernel times: read if it is there, written afterwards.

    Returns:
        Device memory for activations, where the log says it.

    Raises:
        StageError: the builder refused; the lines of its log are quoted.
    """
    with log_path.open("w", encoding="utf-8", errors="replace") as file:
        log = CompilerLog(file)
        logger = compiler_logger(trt, log)
        builder = trt.Builder(logger)
        network, parser = parse_network(trt, builder, logger, graph_path, log, log_path)
        lower_attention(trt, network, spec.masked_attentions(limits.max_seq_len))
        lower_all_reduces(trt, network, all_reduce_names(spec), spec.mapping.tp)
        config = _builder_config(trt, builder, spec, limits, options)
        cache = _read_timing_cache(config, timing_cache)
        with plan_path.open("xb") as plan_file:
            writer = plan_writer(trt, plan_file)
            done = builder.build_serialized_network_to_stream(network, config, writer)
        del parser  # holds the weights that the network points to
    if writer.failure is not None:
        raise StageError(not_written(plan_path, writer.failure))
    # Warnings of a builder that was never seen at work cannot be judged; dropped inputs can.
    log.unexpected[:] = [line for line in log.unexpected if is_fatal(line)]
    if log.unexpected or not done:
        raise StageError(log_problems(log, log_path, "the build failed"))
    if timing_cache is not None and cache is not None:
        _write_timing_cache(config, timing_cache)
    return log.activation_bytes


def is_fatal(line: str) -> bool:
    """Whether a line of CompilerLog.unexpected must fail a build of TensorRT's own builder."""
    return not line.startswith("WARNING") or "unused input" in line.lower()


def profiles(
    spec: NetworkSpec, limits: BuildLimits, options: PlanOptions
) -> list[dict[str, Range]]:
    """Shapes of every input, one dictionary for each optimization profile.

    With two, the first is for prompts (usually max_input_len tokens), the second for one token of every
    row: kernels of the one are slow for the other.
    """
    every = profile_shapes(spec, limits)
    if options.profiles == "one":
        return [every]
    most = limits.max_input_len
    context = {
        name: _with_tokens(shapes, (1, most, most)) if name in _WITH_TOKENS else shapes
        for name, shapes in every.items()
    }
    generation = {
        name: _with_tokens(shapes, (1, 1, 1))
        if name in (*_WITH_TOKENS, LOGIT_POSITIONS)
        else shapes
        for name, shapes in every.items()
    }
    return [context, generation]


def _with_tokens(shapes: Range, tokens: Sequence[int]) -> Range:
    """The same with other sizes of the token axis."""
    least, usual, most = (
        (*shape[:_TOKEN_AXIS], number, *shape[_TOKEN_AXIS + 1 :])
        for shape, number in zip(shapes, tokens, strict=True)
    )
    return least, usual, most


def _builder_config(
    trt: Any, builder: Any, spec: NetworkSpec, limits: BuildLimits, options: PlanOptions
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    if options.strip_plan:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.refit or options.strip_plan:
        config.set_flag(trt.BuilderFlag.REFIT)
    for shapes in profiles(spec, limits, options):
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    return config


def _read_timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    content = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(content)
    # Times of another GPU are refused: the file's name has the SM, but not the model.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _write_timing_cache(config: Any, path: Path) -> None:
    """In one step: ranks may build at the same time, and the last one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    fresh.write_bytes(bytes(config.get_timing_cache().serialize()))
    fresh.replace(path)
