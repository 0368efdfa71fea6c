"""Which text file a config means."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import BUNDLED, LoadedConfig
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH


def calibration_path(loaded: LoadedConfig) -> Path:
    """The file that `quantize.calibration.data` names."""
    data = loaded.config.quantize.calibration.data
    if data == BUNDLED:
        return CALIBRATION_PATH
    return loaded.resolve(data, "quantize", "calibration", "data")


def heldout_path(loaded: LoadedConfig) -> Path:
    """The file that `verify.data` names."""
    data = loaded.config.verify.data
    return HELDOUT_PATH if data == BUNDLED else loaded.resolve(data, "verify", "data")
