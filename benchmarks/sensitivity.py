"""Which cheap measure of a group's sensitivity predicts what quantizing it alone costs the demo model?

The truth is the KL of the logits with one group of linears in one format (`sensitivity: kl`). For the
two cheaper measures the rank correlation (Spearman) with it is printed: over all groups and formats, and
within each format, where it decides which groups of a mixed model get more bits.

    python benchmarks/sensitivity.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.demo import CALIBRATION_PATH, MODEL_DIR
from pipeline.progress import SilentProgress
from pipeline.quant.backends import ONNXRUNTIME
from pipeline.quant.data import load_texts, token_windows
from pipeline.quant.preflight import QuantizeOptions, check_source
from pipeline.quant.sensitivity.divergence import divergences
from pipeline.quant.sensitivity.groups import candidates, format_groups
from pipeline.quant.sensitivity.walk import SensitivityWalk
from pipeline.quant.source import SourceTokenizer

SEQ_LEN = 256
FORMATS = candidates(ONNXRUNTIME, 89)


def measured(measure: Any, num_windows: int) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Format -> loss of each group; and the seconds it took."""
    started = time.monotonic()
    options = QuantizeOptions("mixed", 128, num_windows, SEQ_LEN, 8, sensitivity=measure)
    checkpoint = check_source(MODEL_DIR, options)
    texts, tokenizer = load_texts(CALIBRATION_PATH), SourceTokenizer(MODEL_DIR)
    windows = token_windows(
        texts, tokenizer, num_windows=num_windows, seq_len=SEQ_LEN, seed=0, what="text of the demo"
    )
    with tempfile.TemporaryDirectory() as folder:
        walk = SensitivityWalk(checkpoint, options, windows, SilentProgress(), Path(folder))
        groups = format_groups(checkpoint.shape)
        losses = (
            divergences(walk, groups, FORMATS) if measure == "kl" else walk.losses(groups, FORMATS)
        )
    rounded = [name for name in FORMATS if name != "fp16"]
    by_format = {name: np.array([loss[name] for loss in losses]) for name in rounded}
    return by_format, time.monotonic() - started


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's; no two losses are equal."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32, help="windows of 256 tokens")
    given = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    truth, seconds = measured("kl", given.samples)
    print(f"kl: {seconds:.0f} s", flush=True)
    print("| measure | all |", " | ".join(truth), "| seconds |")
    print("|---|---|", "---|" * len(truth), "---|", sep="")
    for measure in ("layer", "output"):
        found, seconds = measured(measure, given.samples)
        every = rank_correlation(*(np.concatenate(list(one.values())) for one in (found, truth)))
        within = " | ".join(f"{rank_correlation(found[name], truth[name]):.3f}" for name in truth)
        print(f"| {measure} | {every:.3f} | {within} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
