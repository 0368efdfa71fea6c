"""export_network: one rank of a TensorRT-LLM checkpoint -> two ONNX graphs over one weights file."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.trtllm_config import QUANT_FILE
from pipeline.errors import CheckpointError, Problem
from pipeline.network.limits import BuildLimits
from pipeline.network.rank_facts import RANK_PROPERTY
from pipeline.network.spec import NetworkSpec
from pipeline.network.spec_reader import QUANTIZED_LAYERS, read_spec
from pipeline.progress import Progress
from pipeline.quant.formats import FORMATS

LIMITS_PROPERTY = "trtpipe.limits"
MIXED_ALGO = FORMATS["mixed"].quant_algo


def cpu_graph_path(engine_dir: Path, rank: int) -> Path:
    """The float32 graph that ONNX Runtime executes."""
    return engine_dir / f"rank{rank}.onnx"


def tensorrt_graph_path(engine_dir: Path, rank: int) -> Path:
    """The float16 graph that TensorRT's ONNX parser takes."""
    return engine_dir / f"rank{rank}.trt.onnx"


def weights_path(engine_dir: Path, rank: int) -> Path:
    """The data file both graphs point into."""
    return engine_dir / f"rank{rank}.weights"


def export_network(
    checkpoint_dir: Path,
    rank: int,
    out_dir: Path,
    limits: BuildLimits,
    progress: Progress,
    *,
    vocab_size: int | None = None,
) -> None:
    """Write rank{r}.onnx, rank{r}.trt.onnx and rank{r}.weights into `out_dir`.

    Args:
        checkpoint_dir: TensorRT-LLM checkpoint: config.json and rank{r}.safetensors.
        rank: global rank; config.json says how many there are.
        out_dir: existing directory; the three files must not exist there yet.
        limits: max_seq_len becomes the static cache length; all are noted in the graphs.
        progress: told of one unit per layer, plus embedding and lm_head.
        vocab_size: how many rows of lm_head are tokens, when the checkpoint's own vocab_size
            counts padding rows (ModelOpt's exporter pads AWQ vocabularies to a multiple of 64).
            Padding rows get no logit, so they can never be sampled; with tensor parallelism who joins
            the ranks' logits cuts theirs (see RankFacts).

    Raises:
        CheckpointError: config or tensors that the network does not implement or that do not fit.
        StageError: a file exists already, or the disk is full.
    """
    from pipeline.checkpoint.reader import CheckpointReader
    from pipeline.network.rank_tensors import check_rank, rank_facts, store_rank
    from pipeline.network.weights_file import WeightsFile

    spec = read_checkpoint_spec(checkpoint_dir, rank, limits, vocab_size)
    rank_path = checkpoint_dir / f"rank{rank}.safetensors"
    if not rank_path.is_file():
        fix = "convert the checkpoint again"
        raise CheckpointError(Problem(str(rank_path), "no such file", fix=fix))
    reader = CheckpointReader(rank_path)
    check_rank(reader, spec, rank_path)
    with WeightsFile(weights_path(out_dir, rank)) as weights_file:
        stored = store_rank(reader, spec, weights_file, limits.max_seq_len, progress)

    from pipeline.network.blocks import add_decoder
    from pipeline.network.graph import GraphBuilder

    metadata = {
        LIMITS_PROPERTY: json.dumps(asdict(limits), sort_keys=True),
        RANK_PROPERTY: rank_facts(spec, stored).to_json(),
    }
    for path, compute in (
        (cpu_graph_path(out_dir, rank), "float32"),
        (tensorrt_graph_path(out_dir, rank), "float16"),
    ):
        graph = GraphBuilder("decoder", compute, weights_path(out_dir, rank).name)
        add_decoder(graph, spec, stored, limits.max_seq_len)
        graph.save(path, metadata)


def read_checkpoint_spec(
    checkpoint_dir: Path, rank: int, limits: BuildLimits, vocab_size: int | None = None
) -> NetworkSpec:
    """NetworkSpec of one rank of a checkpoint directory, checked against the limits.

    Raises:
        CheckpointError: as read_spec; also a longer sequence or a larger vocabulary than the model's.
    """
    path = checkpoint_dir / "config.json"
    config = _read_object(path)
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and quantization.get("quant_algo") == MIXED_ALGO:
        layers = _read_object(checkpoint_dir / QUANT_FILE).get(QUANTIZED_LAYERS)
        config["quantization"] = {**quantization, QUANTIZED_LAYERS: layers}
    spec = read_spec(config, str(path), rank)
    problems = []
    if limits.max_seq_len > spec.max_position_embeddings:
        problems.append(
            Problem(
                str(path),
                f"max_seq_len {limits.max_seq_len} is above the model's "
                f"max_position_embeddings {spec.max_position_embeddings}",
                fix="lower max_seq_len",
            )
        )
    if vocab_size is not None and not 1 <= vocab_size <= spec.vocab_size:
        problems.append(
            Problem(str(path), f"{vocab_size} tokens", f"1 to vocab_size {spec.vocab_size}")
        )
    if problems:
        raise CheckpointError(problems)
    return spec if vocab_size is None else replace(spec, vocab_size=vocab_size)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}")) from error
    if not isinstance(fields, dict):
        raise CheckpointError(Problem(str(path), "is not a JSON object"))
    return fields
