"""Logits of the demo model's ranks under mpirun beside those of the same checkpoint in one network.

Both sides are float32 in ONNX Runtime and see the same held-out windows. What differs is where sums are
cut: the numbers say how much that changes, and show that no slice is wrong.

    python benchmarks/parallel_numerics.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.engine.collectives import OverMpi
from pipeline.engine.sharded import ShardedNetwork
from pipeline.launch import RankJob, run_ranks
from pipeline.network import BuildLimits, export_network
from pipeline.progress import SilentProgress

ROOT = Path(__file__).resolve().parents[1]
QUIET = SilentProgress()
MAPPINGS = ((2, 1), (4, 1), (1, 2), (2, 2))
"""(tp, pp)."""
GROUP_SIZE = 64  # 256 channels over four ranks
HEADER = "| | mapping | ranks | largest logit | largest difference | same first choice |"


def _export(checkpoint: Path, engine: Path, tp: int, pp: int, limits: BuildLimits) -> None:
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(checkpoint, Path(folder), tp=tp, pp=pp, progress=QUIET)
        for rank in range(tp * pp):
            export_network(Path(folder), rank, engine, limits, QUIET)


def _unsharded(engine: Path, tokens_WT: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits [W, T, V] of the whole network, in one session."""
    from pipeline.engine.onnxruntime import OnnxNetwork

    network = OnnxNetwork(engine)
    num_windows, num_tokens = tokens_WT.shape
    positions = np.tile(np.arange(num_tokens), (num_windows, 1))
    zeros = np.zeros(num_windows, np.int64)
    cache = network.new_cache(num_windows)
    return network.run(tokens_WT, positions, zeros, zeros + num_tokens, positions, cache)


def _sharded(engine: Path, folder: Path, tp: int, pp: int) -> npt.NDArray[np.float32]:
    request = {"engine": str(engine), "folder": str(folder), "tp": tp, "pp": pp}
    jobs = [
        RankJob(
            rank,
            f"benchmarks.{Path(__file__).stem}",
            json.dumps(request),
            log_path=str(folder / f"rank{rank}.log"),
            error_path=str(folder / f"rank{rank}.error.json"),
        )
        for rank in range(tp * pp)
    ]
    run_ranks(jobs, "mpirun", folder / "jobs.json")
    logits: npt.NDArray[np.float32] = np.load(folder / "logits.npy")
    return logits


def _rank(request: dict[str, Any]) -> None:
    """One process under mpirun."""
    collectives = OverMpi(request["tp"], request["pp"])
    network = ShardedNetwork(Path(request["engine"]), collectives, collectives.num_threads)
    tokens_WT = np.load(Path(request["folder"]) / "tokens.npy")
    chunks = list(network.logits(tokens_WT, tokens_WT.shape[1]))
    if network.gathers:
        np.save(Path(request["folder"]) / "logits.npy", np.stack(chunks))


def _rows(name: str, checkpoint: Path, tokens_WT: npt.NDArray[np.int64]) -> Iterator[str]:
    limits = BuildLimits(len(tokens_WT), tokens_WT.shape[1], tokens_WT.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        _export(checkpoint, Path(folder), 1, 1, limits)
        expected_WTV = _unsharded(Path(folder), tokens_WT)
    for tp, pp in MAPPINGS:
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "tokens.npy", tokens_WT)
            _export(checkpoint, Path(folder), tp, pp, limits)
            found_WTV = _sharded(Path(folder), Path(folder), tp, pp)
        same = (found_WTV.argmax(-1) == expected_WTV.argmax(-1)).mean()
        yield (
            f"| {name} | tp {tp}, pp {pp} | {tp * pp} | {np.abs(expected_WTV).max():.1f} | "
            f"{np.abs(found_WTV - expected_WTV).max():.1e} | {100 * same:.2f} % |"
        )


def _int4(folder: Path) -> Path:
    from pipeline.quant.preflight import check_source
    from pipeline.quant.quantizer import QuantizeOptions, quantize_windows

    options = QuantizeOptions("int4_awq", GROUP_SIZE, num_samples=16, seq_len=256, batch_size=8)
    windows = _windows(CALIBRATION_PATH, 16, 256)
    quantize_windows(check_source(MODEL_DIR, options), folder, options, windows, QUIET)
    return folder


def _windows(path: Path, count: int, seq_len: int) -> Any:
    from pipeline.quant.data import load_texts, token_windows
    from pipeline.quant.source import SourceTokenizer

    texts = load_texts(path)
    tokenizer = SourceTokenizer(MODEL_DIR)
    return token_windows(
        texts, tokenizer, num_windows=count, seq_len=seq_len, seed=0, what="text of the demo"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heldout", type=int, default=8, help="windows to measure on")
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    os.chdir(ROOT)  # the ranks import this file
    tokens_WT = _windows(HELDOUT_PATH, given.heldout, given.seq_len).tokens_WT
    print(HEADER, "|---|---|---|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint in (
            ("demo, fp16", MODEL_DIR),
            (f"demo, int4_awq g{GROUP_SIZE}", _int4(Path(folder))),
        ):
            for row in _rows(name, checkpoint, tokens_WT):
                print(row, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        _rank(json.loads(sys.argv[1]))
    else:
        main()
