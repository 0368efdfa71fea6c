"""The float16 graph -> TensorRT-RTX plan: parse, lower, compile, stream to disk.

TensorRT-RTX keeps the first logger of a process and ignores later ones: one build per process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.disk import not_written
from pipeline.engine.rtx_log import CompilerLog
from pipeline.engine.rtx_lowering import lower_all_reduces, lower_attention
from pipeline.errors import Problem, StageError, ToolError
from pipeline.network.collectives import all_reduce_names
from pipeline.network.io_names import (
    HIDDEN_STATES,
    INPUT_IDS,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.network.limits import BuildLimits
from pipeline.network.spec import NetworkSpec

_SHOWN_LINES = 10


@dataclass(frozen=True)
class CompilerReport:
    """What the builder said about the plan it wrote.

    Attributes:
        listing: text of its layer listing.
        activation_bytes: device memory for activations at the largest allowed shapes.
    """

    listing: str
    activation_bytes: int | None


def compiler_version() -> str:
    """Version of the installed compiler, e.g. "1.7.1.116".

    Raises:
        ToolError: it is not installed.
    """
    return str(_bindings().__version__)


def build_plan(
    graph_path: Path,
    plan_path: Path,
    spec: NetworkSpec,
    limits: BuildLimits,
    sms: Sequence[int],
    log_path: Path,
) -> CompilerReport:
    """Compile `graph_path` for compute capabilities `sms` into `plan_path`; no GPU is needed.

    Raises:
        ToolError: TensorRT-RTX is not installed.
        StageError: the compiler refused, or its log holds a line that is not known to be harmless;
            the lines are quoted.
    """
    trt = _bindings()
    with log_path.open("w", encoding="utf-8", errors="replace") as file:
        log = CompilerLog(file)
        logger = compiler_logger(trt, log)
        builder = trt.Builder(logger)
        network, parser = parse_network(trt, builder, logger, graph_path, log, log_path)
        lower_attention(trt, network, spec.masked_attentions(limits.max_seq_len))
        lower_all_reduces(trt, network, all_reduce_names(spec), spec.mapping.tp)
        config = _builder_config(trt, builder, network, spec, limits, sms)
        with plan_path.open("xb") as plan_file:
            writer = plan_writer(trt, plan_file)
            done = builder.build_serialized_network_to_stream(network, config, writer)
        del parser  # holds the weights that the network points to
    if writer.failure is not None:
        raise StageError(not_written(plan_path, writer.failure))
    if log.unexpected or not done:
        raise StageError(log_problems(log, log_path, "the build failed"))
    return CompilerReport(log.listing, log.activation_bytes)


def _bindings() -> Any:
    try:
        import tensorrt_rtx_bindings
    except ImportError as error:
        raise ToolError(
            Problem(
                "backend tensorrt_rtx",
                f"TensorRT-RTX cannot be loaded: {error}",
                fix="pip install 'trtpipe[rtx]'",
            )
        ) from error
    return tensorrt_rtx_bindings


def compiler_logger(trt: Any, log: CompilerLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()


def plan_writer(trt: Any, plan_file: BinaryIO) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """An exception may not cross the compiler's C++ frames, so it is kept for later."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return plan_file.write(data)
            except OSError as error:
                self.failure = error
                return 0

    return Writer()


def parse_network(
    trt: Any, builder: Any, logger: Any, graph_path: Path, log: CompilerLog, log_path: Path
) -> tuple[Any, Any]:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph_path)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        log.unexpected += [f"PARSER: {error}" for error in errors]
        raise StageError(log_problems(log, log_path, "the parser refused the network"))
    return network, parser


def _builder_config(
    trt: Any, builder: Any, network: Any, spec: NetworkSpec, limits: BuildLimits, sms: Sequence[int]
) -> Any:
    config = builder.create_builder_config()
    # The listing that rtx_layers checks is only printed in full at this verbosity.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in profile_shapes(spec, limits).items():
        profile.set_shape(name, least, usual, most)
    config.add_optimization_profile(profile)
    return config


Shape = tuple[int, ...]


def profile_shapes(spec: NetworkSpec, limits: BuildLimits) -> dict[str, tuple[Shape, Shape, Shape]]:
    """(least, usual, most) shape of every input. The usual call is a decode step of a full batch."""
    batch, tokens, hidden = limits.max_batch_size, limits.max_input_len, spec.hidden_size
    logits = tokens if limits.gather_context_logits else 1
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {
        WRITE_INDICES: ((1,), (batch,), (batch,)),
        KV_LENGTHS: ((1,), (batch,), (batch,)),
    }
    if spec.has_embedding:
        shapes[INPUT_IDS] = ((1, 1), (batch, 1), (batch, tokens))
    else:
        shapes[HIDDEN_STATES] = ((1, 1, hidden), (batch, 1, hidden), (batch, tokens, hidden))
    if spec.reads_positions(limits.max_seq_len):
        shapes[POSITION_IDS] = ((1, 1), (batch, 1), (batch, tokens))
    if spec.has_head:
        shapes[LOGIT_POSITIONS] = ((1, 1), (batch, 1), (batch, logits))
    cache_CTD = (spec.rank_kv_heads, limits.max_seq_len, spec.head_size)
    for layer in range(spec.num_rank_layers):
        for past, _ in cache_names(layer):
            shapes[past] = ((1, *cache_CTD), (batch, *cache_CTD), (batch, *cache_CTD))
    return shapes


def log_problems(log: CompilerLog, log_path: Path, otherwise: str) -> list[Problem]:
    lines = log.unexpected or [otherwise]
    problems = [Problem(str(log_path), line) for line in lines[:_SHOWN_LINES]]
    if len(lines) > _SHOWN_LINES:
        problems.append(Problem(str(log_path), f"and {len(lines) - _SHOWN_LINES} lines more"))
    return problems
