"""What every way of quantizing costs the demo model: one row each, measured on its held-out text.

Each row is made by the code of the quantize stage, on the same calibration windows, and measured on the
exported bytes: weights dequantized as they are stored, inputs rounded where the format rounds them, one
layer at a time beside the original in float32. Bits are those of the decoder layers' linears in an
engine, scales included. The rows are each other's peers; the first quantized one is the plainest way.

    python benchmarks/quantization_table.py
    python benchmarks/quantization_table.py --only "rtn g128" "awq gram"
    python benchmarks/quantization_table.py --plain        # the demo model without its outlier channels
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.source import HfCheckpoint, open_checkpoint
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.demo.outliers import write_plain_checkpoint
from pipeline.models.linears import decoder_linears
from pipeline.progress import SilentProgress
from pipeline.quant.backends import ONNXRUNTIME
from pipeline.quant.data import TokenWindows, load_texts, token_windows
from pipeline.quant.layers.evaluate import Comparison, compare_checkpoints
from pipeline.quant.preflight import check_source
from pipeline.quant.quantizer import QuantizeOptions, quantize_windows
from pipeline.quant.sensitivity.groups import candidates, format_groups, mean_bits
from pipeline.quant.source import SourceTokenizer, copy_companions

BUDGET = 4.5
AWQ: dict[str, Any] = {"format": "int4_awq", "algorithm": "awq"}
MIXED: dict[str, Any] = {
    "format": "mixed",
    "budget_bits": BUDGET,
    "candidates": candidates(ONNXRUNTIME, 89),
}
ROWS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "rtn g128": {**AWQ, "algorithm": "rtn"},
    "rtn g64": {**AWQ, "algorithm": "rtn", "group_size": 64},
    "awq ModelOpt": {**AWQ, "search": "modelopt"},
    "awq gram": AWQ,
    "awq gram g64": {**AWQ, "group_size": 64},
    "awq + clip": {**AWQ, "algorithm": "awq_clip"},
    "gptq": {**AWQ, "algorithm": "gptq"},
    "int4_gptq, zero points": {"format": "int4_gptq"},
    f"mixed {BUDGET} bits": MIXED,
    f"mixed {BUDGET} bits + clip": {**MIXED, "algorithm": "awq_clip"},
    "w4a8_awq": {"format": "w4a8_awq"},
    "fp8": {"format": "fp8"},
    "int8_sq": {"format": "int8_sq"},
    "int8_wo": {"format": "int8_wo"},
}
HEADER = "| | bits a weight | perplexity | mean KL | top-1 agreement | seconds |"


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    source_dir: Path
    calibration: TokenWindows
    heldout: TokenWindows
    batch_size: int

    def row(self, name: str) -> str:
        """Quantize, measure and describe."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            original = open_checkpoint(self.source_dir)
            made, bits = original, 16.0
            if ROWS[name]:
                made, bits = self._quantized(Path(folder), ROWS[name])
            seconds = time.monotonic() - started
            found = compare_checkpoints(original, made, self.heldout, Path(folder))
        return _line(name, bits, found, seconds)

    def _quantized(self, folder: Path, fields: dict[str, Any]) -> tuple[HfCheckpoint, float]:
        options = QuantizeOptions(
            **{
                "group_size": 128,
                "num_samples": len(self.calibration.tokens_WT),
                "seq_len": self.calibration.tokens_WT.shape[1],
                "batch_size": self.batch_size,
                **fields,
            }
        )
        out_dir = folder / "out"
        out_dir.mkdir()
        checkpoint = check_source(self.source_dir, options)
        quantize_windows(checkpoint, out_dir, options, self.calibration, SilentProgress())
        made = open_checkpoint(out_dir)
        linears = decoder_linears(made.shape)
        formats = {name: made.format.of(name).name for name in linears}
        groups = format_groups(made.shape)
        return made, mean_bits(groups, formats, options.group_size)


def _line(name: str, bits: float, found: Comparison, seconds: float) -> str:
    return (
        f"| {name} | {bits:.3f} | {found.perplexity:.4f} | {found.mean_kl:.5f} | "
        f"{found.top1_agreement:.4f} | {seconds:.0f} |"
    )


def _windows(path: Path, count: int, seq_len: int) -> TokenWindows:
    return token_windows(
        load_texts(path),
        SourceTokenizer(MODEL_DIR),
        num_windows=count,
        seq_len=seq_len,
        seed=0,
        what="text of the demo",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--heldout", type=int, default=64, help="windows to measure on")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="without outlier channels")
    given = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        source_dir = MODEL_DIR
        if given.plain:
            source_dir = Path(folder)
            write_plain_checkpoint(MODEL_DIR, source_dir)
            copy_companions(MODEL_DIR, source_dir)
        bench = Bench(
            source_dir,
            _windows(CALIBRATION_PATH, given.samples, given.seq_len),
            _windows(HELDOUT_PATH, given.heldout, given.seq_len),
            given.batch_size,
        )
        print(HEADER, "|---|---|---|---|---|---|", sep="\n", flush=True)
        for name in given.only:
            print(bench.row(name), flush=True)
            print(f"{name} done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
