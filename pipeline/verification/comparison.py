"""Original model against engine on held-out text.

Shape suffixes: T tokens of one window, C positions of one chunk, V true vocabulary, N measured tokens.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.source import PLAIN_METHOD, open_files
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import CheckpointError, PlanError, Problem, StageError
from pipeline.models import ModelShape
from pipeline.progress import Progress
from pipeline.quant.data import Document, TokenWindows, token_windows
from pipeline.quant.source import SourceTokenizer, open_original, refuse_foreign_tokens
from pipeline.verification.gates import VerifyOptions, judge
from pipeline.verification.logits import EngineLogits, LogitsSource, OriginalLogits
from pipeline.verification.report import (
    Data,
    Histogram,
    NotFinite,
    Report,
    Side,
    WindowResult,
)
from pipeline.verification.statistics import TokenStatistics, perplexity, token_statistics

CHUNK_BYTES = 64 << 20
"""Upper bound of one side's logits in memory."""

MAX_LOSS_PAIRS = 2000
"""Points of the scatter plot."""

KL_EDGES = tuple(float(edge) for edge in np.logspace(-9, 1, 41))
"""Histogram edges in nats; four bins per factor of ten."""


@dataclass(frozen=True)
class Measurement:
    """All windows of both sides.

    Attributes:
        windows: statistics of each window.
        not_finite: where logits are NaN or infinite, first position of each side of a window.
    """

    windows: tuple[TokenStatistics, ...]
    not_finite: tuple[NotFinite, ...]


def compare(
    source_dir: Path,
    engine_dir: Path,
    texts: Sequence[str | Document],
    options: VerifyOptions,
    progress: Progress,
) -> Report:
    """Run both sides over windows of `texts` and judge the difference.

    The original is the checkpoint that the build started from, in transformers (float32); if it was
    quantized already, it computes as its format says, and the report says so. The engine is the network
    and the weights of `engine_dir` in ONNX Runtime.

    Raises:
        CheckpointError: either side cannot be loaded, or they do not belong together.
        PlanError: too little text, or windows longer than the model or the engine takes.
        StageError: an engine of several ranks, which cannot be executed in one process.
    """
    from pipeline.engine.onnxruntime import OnnxNetwork

    checkpoint = open_original(source_dir)
    shape = checkpoint.shape
    quant_algo = _check_engine_config(engine_dir)
    windows = token_windows(
        texts,
        SourceTokenizer(source_dir),
        num_windows=options.num_windows,
        seq_len=options.seq_len,
        seed=options.seed,
        what="held-out text",
    )
    refuse_foreign_tokens(windows, shape.vocab_size, source_dir)
    network = OnnxNetwork(engine_dir, num_threads=options.num_threads)
    limits = network.shape.limits
    _check_window_fits(options.seq_len, shape, limits.max_seq_len)
    engine = EngineLogits(network)
    with _torch_threads(options.num_threads):
        original = OriginalLogits(source_dir)
        measurement = measure(original, engine, windows, limits.max_input_len, progress)
    return _report(
        measurement,
        windows,
        options,
        shape=shape,
        quantized_by=None if checkpoint.method == PLAIN_METHOD else checkpoint.method,
        quant_algo=quant_algo,
        vocab_sizes=(original.vocab_size, engine.vocab_size),
        checkpoint_bytes=sum(info.nbytes for info in open_files(source_dir).tensors.values()),
        engine_files=_engine_files(engine_dir),
    )


def measure(
    original: LogitsSource,
    engine: LogitsSource,
    windows: TokenWindows,
    max_chunk_len: int,
    progress: Progress,
) -> Measurement:
    """Statistics of every next-token prediction inside each window (T - 1 of T positions).

    Memory is bounded by one chunk of logits of each side, whatever the number of windows.

    Raises:
        CheckpointError: the engine's vocabulary is smaller than the original's.
    """
    if engine.vocab_size < original.vocab_size:
        raise CheckpointError(
            Problem(
                "engine",
                f"its vocabulary of {engine.vocab_size} is smaller than the original's",
                allowed=f"at least {original.vocab_size}",
                fix="build the engine from this checkpoint",
            )
        )
    chunk_len = max(1, min(max_chunk_len, CHUNK_BYTES // (4 * engine.vocab_size)))
    results: list[TokenStatistics] = []
    not_finite: list[NotFinite] = []
    progress.start(len(windows.tokens_WT), "windows")
    for index, tokens_T in enumerate(windows.tokens_WT):
        result, bad = _measure_window(original, engine, tokens_T, chunk_len, index)
        results.append(result)
        not_finite.extend(bad)
        progress.advance(f"KL {result.kl_N.mean():.4g} nats")
    return Measurement(tuple(results), tuple(not_finite))


def _measure_window(
    original: LogitsSource,
    engine: LogitsSource,
    tokens_T: NDArray[np.int64],
    chunk_len: int,
    index: int,
) -> tuple[TokenStatistics, list[NotFinite]]:
    """Statistics of one window, and for each side where it first was not finite."""
    parts: list[TokenStatistics] = []
    bad: dict[str, NotFinite] = {}
    start = 0
    both = zip(
        original.logits(tokens_T, chunk_len), engine.logits(tokens_T, chunk_len), strict=True
    )
    for original_CV, padded_CV in both:
        engine_CV = padded_CV[:, : original.vocab_size]
        for found in _not_finite(original_CV, engine_CV, index, start):
            bad.setdefault(found.side, found)
        next_C = tokens_T[start + 1 : start + 1 + len(original_CV)]
        num = len(next_C)  # one less in the last chunk: the last position has no next token
        if num:
            parts.append(token_statistics(original_CV[:num], engine_CV[:num], next_C))
        start += len(original_CV)
    return TokenStatistics.join(parts), list(bad.values())


def _not_finite(
    original_CV: NDArray[np.float32], engine_CV: NDArray[np.float32], window: int, start: int
) -> Iterator[NotFinite]:
    sides: tuple[tuple[Literal["original", "engine"], NDArray[np.float32]], ...] = (
        ("original", original_CV),
        ("engine", engine_CV),
    )
    for side, logits_CV in sides:
        finite_C = np.isfinite(logits_CV).all(axis=1)
        if not finite_C.all():
            yield NotFinite(side=side, window=window, position=start + int(finite_C.argmin()))


def _report(
    measurement: Measurement,
    windows: TokenWindows,
    options: VerifyOptions,
    *,
    shape: ModelShape,
    quantized_by: str | None,
    quant_algo: str | None,
    vocab_sizes: tuple[int, int],
    checkpoint_bytes: int,
    engine_files: dict[str, int],
) -> Report:
    tokens = TokenStatistics.join(list(measurement.windows))
    original = Side(
        vocab_size=vocab_sizes[0],
        loss=float(tokens.original_loss_N.mean()),
        perplexity=perplexity(tokens.original_loss_N),
        weight_bytes=checkpoint_bytes,
        deployed_bytes=checkpoint_bytes,
    )
    engine = Side(
        vocab_size=vocab_sizes[1],
        loss=float(tokens.engine_loss_N.mean()),
        perplexity=perplexity(tokens.engine_loss_N),
        weight_bytes=sum(size for name, size in engine_files.items() if name.endswith(".weights")),
        deployed_bytes=_deployed_bytes(engine_files),
    )
    # Of the losses, not of two perplexities that may both be infinite.
    ratio = perplexity(tokens.engine_loss_N - tokens.original_loss_N)
    mean_kl = float(tokens.kl_N.mean())
    agreement = float(tokens.same_top1_N.mean())
    return Report(
        architecture=shape.architecture,
        quant_algo=quant_algo,
        original_quantized_by=quantized_by,
        data=Data(
            num_windows=len(windows.tokens_WT),
            num_windows_available=windows.num_available,
            seq_len=int(windows.tokens_WT.shape[1]),
            num_tokens=len(tokens.kl_N),
            tokens_sha256=windows.digest,
        ),
        original=original,
        engine=engine,
        engine_files=engine_files,
        perplexity_ratio=ratio,
        mean_kl=mean_kl,
        p99_kl=float(np.quantile(tokens.kl_N, 0.99)),
        max_kl=float(tokens.kl_N.max()),
        top1_agreement=agreement,
        not_finite=measurement.not_finite,
        verdicts=judge(
            options.gates,
            perplexity_ratio=ratio,
            mean_kl=mean_kl,
            top1_agreement=agreement,
            not_finite=measurement.not_finite,
        ),
        windows=tuple(_window_results(measurement)),
        kl_histogram=_kl_histogram(tokens.kl_N),
        loss_pairs=_loss_pairs(tokens),
        versions={
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "tokenizers", "onnxruntime")
        },
    )


def _window_results(measurement: Measurement) -> Iterator[WindowResult]:
    for index, window in enumerate(measurement.windows):
        yield WindowResult(
            window=index,
            original_loss=float(window.original_loss_N.mean()),
            engine_loss=float(window.engine_loss_N.mean()),
            mean_kl=float(window.kl_N.mean()),
            top1_agreement=float(window.same_top1_N.mean()),
        )


def _kl_histogram(kl_N: NDArray[np.float64]) -> Histogram:
    known_N = kl_N[np.isfinite(kl_N)]
    counts, _ = np.histogram(known_N.clip(KL_EDGES[0], KL_EDGES[-1]), KL_EDGES)
    return Histogram(edges=KL_EDGES, counts=tuple(int(count) for count in counts))


def _loss_pairs(tokens: TokenStatistics) -> tuple[tuple[float, float], ...]:
    step = max(1, -(-len(tokens.kl_N) // MAX_LOSS_PAIRS))
    pairs = zip(tokens.original_loss_N[::step], tokens.engine_loss_N[::step], strict=True)
    return tuple((round(float(left), 6), round(float(right), 6)) for left, right in pairs)


def _check_engine_config(engine_dir: Path) -> str | None:
    """The engine's quant_algo (None for fp16), when it is an engine that can be executed here."""
    path = engine_dir / "config.json"
    try:
        config: Any = parse_object(path.read_bytes()).get("pretrained_config")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise CheckpointError(Problem(str(path), what, fix="build the engine again")) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
    if not isinstance(config, dict):
        raise CheckpointError(Problem(str(path), "has no pretrained_config: not an engine"))
    num_ranks = config.get("mapping", {}).get("world_size", 1)
    if num_ranks != 1:
        raise StageError(
            Problem(
                str(engine_dir),
                f"the engine has {num_ranks} ranks; they cannot be executed in one process yet",
                allowed="1 rank",
                fix="verify the same checkpoint built with tp: 1 and pp: 1",
            )
        )
    quant_algo: str | None = config.get("quantization", {}).get("quant_algo")
    return quant_algo


def _check_window_fits(seq_len: int, shape: ModelShape, max_seq_len: int) -> None:
    longest = min(shape.max_position_embeddings, max_seq_len)
    if seq_len > longest:
        whose = "model" if longest < max_seq_len else "engine (build.max_seq_len)"
        raise PlanError(
            Problem(
                "verify.seq_len",
                f"{seq_len} is longer than the {whose} takes",
                allowed=f"at most {longest}",
            )
        )


def _engine_files(engine_dir: Path) -> dict[str, int]:
    suffixes = (".engine", ".onnx", ".weights")
    files = sorted(path for path in engine_dir.glob("rank*") if path.suffix in suffixes)
    return {path.name: path.stat().st_size for path in files}


def _deployed_bytes(engine_files: dict[str, int]) -> int:
    """TensorRT engines hold everything; without one, the CPU graph and the weights it points into."""
    engines = [size for name, size in engine_files.items() if name.endswith(".engine")]
    if engines:
        return sum(engines)
    return sum(size for name, size in engine_files.items() if not name.endswith(".trt.onnx"))


@contextmanager
def _torch_threads(num_threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
