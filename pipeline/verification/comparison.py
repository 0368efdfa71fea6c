"""Original model against engine on held-out text.

Shape suffixes: N measured tokens.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.source import PLAIN_METHOD, HfCheckpoint, open_files
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import CheckpointError, GateError, PlanError, Problem
from pipeline.models import ModelShape
from pipeline.network import cpu_graph_path, weights_path
from pipeline.network.rank_facts import RankFacts
from pipeline.progress import Progress
from pipeline.quant.data import Document, TokenWindows, token_windows
from pipeline.quant.source import SourceTokenizer, open_original, refuse_foreign_tokens
from pipeline.verification.gates import VerifyOptions, judge
from pipeline.verification.measure import Measurement
from pipeline.verification.ranks import RankRequest, run_engine
from pipeline.verification.report import (
    Data,
    Histogram,
    RankMapping,
    Report,
    Side,
    WindowResult,
)
from pipeline.verification.statistics import TokenStatistics, perplexity

if TYPE_CHECKING:
    from pipeline.quant.layers.forward import LayerOutputs

CHUNK_BYTES = 64 << 20
"""Upper bound of one side's logits in memory."""

MAX_LOSS_PAIRS = 2000
"""Points of the scatter plot."""

KL_EDGES = tuple(float(edge) for edge in np.logspace(-9, 1, 41))
"""Histogram edges in nats; four bins per factor of ten."""


def compare(
    source_dir: Path,
    engine_dir: Path,
    texts: Sequence[str | Document],
    options: VerifyOptions,
    progress: Progress,
    work_dir: Path,
    hostfile: Path | None = None,
) -> Report:
    """Run both sides over windows of `texts` and judge the difference.

    The original is the checkpoint that the build started from, in transformers (float32), one decoder
    layer at a time; if it was quantized already, it computes as its format says, and the report says so.
    The engine is the network and the weights of `engine_dir` in ONNX Runtime, a layer at a time too;
    several ranks run under mpirun, one process each.

    Args:
        work_dir: an existing directory for hidden states and logs of ranks; left as it was.
        hostfile: of mpirun, where ranks are to run on other hosts that see the same directories.

    Raises:
        CheckpointError: either side cannot be loaded, or they do not belong together.
        PlanError: too little text, or windows longer than the model or the engine takes.
        GateError: files of a rank are missing or damaged.
        StageError: activations of the original are not finite, or a rank died.
        ToolError: several ranks and no mpirun.
    """
    from pipeline.engine.segments import RankGraph

    checkpoint = open_original(source_dir)
    shape = checkpoint.shape
    engine_config = _read_engine_config(engine_dir)
    graph = RankGraph(engine_dir, 0)
    _check_ranks(engine_dir, engine_config, graph.facts)
    _check_vocabulary(engine_dir, graph.facts.vocab_size, shape.vocab_size)
    windows = token_windows(
        texts,
        SourceTokenizer(source_dir),
        num_windows=options.num_windows,
        seq_len=options.seq_len,
        seed=options.seed,
        what="held-out text",
    )
    refuse_foreign_tokens(windows, shape.vocab_size, source_dir)
    _check_window_fits(options.seq_len, shape, graph.limits.max_seq_len)
    largest_chunk = max(1, CHUNK_BYTES // (4 * graph.facts.vocab_size))
    with TemporaryDirectory(dir=work_dir) as folder, _torch_threads(options.num_threads):
        outputs = _run_original(checkpoint, windows, Path(folder), progress)
        request = RankRequest(
            source_dir=source_dir,
            engine_dir=engine_dir,
            tokens_path=Path(folder) / "tokens.npy",
            hidden_path=outputs.path,
            returns_tuple=outputs.returns_tuple,
            call_len=min(graph.limits.max_input_len, largest_chunk),
            num_threads=options.num_threads,
            tp=graph.facts.tp,
            pp=graph.facts.pp,
            moe_ep=graph.facts.moe_ep,
            measurement_path=Path(folder) / "measurement.npz",
            error_path=str(Path(folder) / "rank{rank}.error.json"),
            progress_path=str(Path(folder) / "rank{rank}.progress"),
        )
        np.save(request.tokens_path, windows.tokens_WT, allow_pickle=False)
        measurement = run_engine(request, graph.facts, Path(folder), progress, hostfile)
    return _report(
        measurement,
        windows,
        options,
        shape=shape,
        quantized_by=None if checkpoint.method == PLAIN_METHOD else checkpoint.method,
        quant_algo=engine_config.get("quantization", {}).get("quant_algo"),
        ranks=graph.facts,
        checkpoint_bytes=sum(info.nbytes for info in open_files(source_dir).tensors.values()),
        engine_files=_engine_files(engine_dir),
    )


def _run_original(
    checkpoint: HfCheckpoint, windows: TokenWindows, work_dir: Path, progress: Progress
) -> LayerOutputs:
    """All decoder layers over all windows, one window at a time."""
    import torch

    from pipeline.quant.layers.batches import equal_length_batches
    from pipeline.quant.layers.forward import run_layers

    progress.say("running the original, layer by layer")
    batches = equal_length_batches(windows, 1)
    return run_layers(checkpoint, batches, work_dir / "original", torch.float32, progress)


def _report(
    measurement: Measurement,
    windows: TokenWindows,
    options: VerifyOptions,
    *,
    shape: ModelShape,
    quantized_by: str | None,
    quant_algo: str | None,
    ranks: RankFacts,
    checkpoint_bytes: int,
    engine_files: dict[str, int],
) -> Report:
    tokens = TokenStatistics.join(list(measurement.windows))
    original = Side(
        vocab_size=shape.vocab_size,
        loss=float(tokens.original_loss_N.mean()),
        perplexity=perplexity(tokens.original_loss_N),
        weight_bytes=checkpoint_bytes,
        deployed_bytes=checkpoint_bytes,
    )
    engine = Side(
        vocab_size=ranks.vocab_size,
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
        mapping=RankMapping(tp=ranks.tp, pp=ranks.pp, moe_ep=ranks.moe_ep),
        executed=_executed(ranks.world_size),
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


def _executed(num_ranks: int) -> str:
    return "1 rank in one process" if num_ranks == 1 else f"{num_ranks} ranks under mpirun"


def _read_engine_config(engine_dir: Path) -> dict[str, Any]:
    """pretrained_config of an engine."""
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
    return config


def _check_ranks(engine_dir: Path, config: dict[str, Any], facts: RankFacts) -> None:
    """Whether config.json and the networks are of one engine, and all ranks are there."""
    world_size = config.get("mapping", {}).get("world_size", 1)
    if world_size != facts.world_size:
        raise CheckpointError(
            Problem(
                str(engine_dir),
                f"config.json is of {world_size} ranks, rank0.onnx of {facts.world_size}",
                allowed="config.json and networks of one build",
                fix="build the engine again",
            )
        )
    problems = [
        Problem(str(path), "is missing", fix="build the engine again")
        for rank in range(facts.world_size)
        for path in (cpu_graph_path(engine_dir, rank), weights_path(engine_dir, rank))
        if not path.is_file()
    ]
    if problems:
        raise GateError(problems)


def _check_vocabulary(engine_dir: Path, engine_size: int, original_size: int) -> None:
    """An engine may have rows of padding; known before hours of computing."""
    if engine_size < original_size:
        raise CheckpointError(
            Problem(
                str(engine_dir),
                f"its vocabulary of {engine_size} is smaller than the original's",
                allowed=f"at least {original_size}",
                fix="build the engine from this checkpoint",
            )
        )


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
