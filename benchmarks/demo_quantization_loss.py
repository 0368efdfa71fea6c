"""How much int4 costs the demo model, and how much of it AWQ saves.

Quantizes the committed model and its plain twin (outlier channels removed) in memory with NVIDIA
ModelOpt, group 128, and measures the held-out loss of the fake-quantized model, before any export.
Prints one row per model and method; the peer of AWQ is round-to-nearest in the same run.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.demo.corpus import read_documents
from pipeline.demo.outliers import write_plain_checkpoint
from pipeline.demo.perplexity import mean_loss
from pipeline.demo.tokenizer import encode_documents

CALIBRATION_ROWS, CALIBRATION_LENGTH = 32, 512
METHODS = {"rtn": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, "awq_lite": mtq.INT4_AWQ_CFG}


def load(model_dir: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def quantized_loss(model_dir: Path, config: Any, calibration: torch.Tensor, heldout: Any) -> float:
    """Held-out nats per token after quantizing with `config` on `calibration` [B, S]."""
    model = load(model_dir)

    @torch.no_grad()
    def calibrate(quantizing: Any) -> None:
        for rows_BS in calibration.split(8):
            quantizing(rows_BS, use_cache=False)

    mtq.quantize(model, copy.deepcopy(config), calibrate)
    return mean_loss(model, heldout)


def tokens_of(path: Path) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return encode_documents(tokenizer, read_documents(path))


def main() -> None:
    torch.set_num_threads(2)
    calibration = tokens_of(CALIBRATION_PATH)[: CALIBRATION_ROWS * CALIBRATION_LENGTH]
    calibration_BS = torch.from_numpy(calibration.reshape(CALIBRATION_ROWS, CALIBRATION_LENGTH))
    heldout = tokens_of(HELDOUT_PATH)
    with tempfile.TemporaryDirectory() as folder:
        plain_dir = Path(folder) / "plain"
        write_plain_checkpoint(MODEL_DIR, plain_dir)
        print(
            f"{'model':10} {'fp32':>8} {'rtn':>9} {'awq_lite':>9} {'awq / rtn':>10}   (nats lost)"
        )
        for name, model_dir in (("plain", plain_dir), ("committed", MODEL_DIR)):
            before = mean_loss(load(model_dir), heldout)
            lost = {
                method: quantized_loss(model_dir, config, calibration_BS, heldout) - before
                for method, config in METHODS.items()
            }
            ratio = lost["awq_lite"] / lost["rtn"]
            print(
                f"{name:10} {before:8.4f} {lost['rtn']:9.4f} {lost['awq_lite']:9.4f} {ratio:10.2f}"
            )


if __name__ == "__main__":
    main()
