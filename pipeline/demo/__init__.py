"""The demo model, a small Llama trained on the Python standard library, and how it was made.

Only paths live here, so that importing this package costs nothing. `model/README.md` is the card.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Hugging Face checkpoint (fp16, with injected outlier channels), tokenizer and texts."""

CALIBRATION_PATH: Path = MODEL_DIR / "calibration.txt"
"""Documents never trained on, for choosing quantization scales."""

HELDOUT_PATH: Path = MODEL_DIR / "heldout.txt"
"""Documents never trained on nor calibrated on, for measuring quality."""

__all__ = ["CALIBRATION_PATH", "HELDOUT_PATH", "MODEL_DIR"]
