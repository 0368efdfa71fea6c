"""Cosine and sine tables of rotary position embedding.

Shapes: P positions, F = head_size / 2 frequencies.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pipeline.models.shape import RotaryScaling


def inverse_frequencies(
    head_size: int, base: float, scaling: RotaryScaling | None
) -> npt.NDArray[np.float64]:
    """Angle per position of each pair of channels, [F], float64, radians.

    linear: all frequencies divided by `factor`. llama3 (Llama 3.1 model card): wavelengths longer
    than original/low_freq_factor are divided, shorter than original/high_freq_factor are kept, and
    those between are blended linearly in the number of turns within the original context.
    """
    exponents_F = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    frequencies_F: npt.NDArray[np.float64] = np.power(float(base), -exponents_F)
    if scaling is None:
        return frequencies_F
    if scaling.kind == "linear":
        return frequencies_F / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert scaling.kind == "llama3", scaling
    assert low is not None and high is not None and original is not None, scaling  # noqa: PT018
    turns_F = original * frequencies_F / (2 * math.pi)
    kept_F: npt.NDArray[np.float64] = np.clip((turns_F - low) / (high - low), 0.0, 1.0)
    blended_F: npt.NDArray[np.float64] = frequencies_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    return blended_F


def rotary_tables(
    head_size: int, base: float, scaling: RotaryScaling | None, num_positions: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(cos, sin), each [P, F] float64, for positions 0..P-1."""
    frequencies_F = inverse_frequencies(head_size, base, scaling)
    angles_PF = np.outer(np.arange(num_positions, dtype=np.float64), frequencies_F)
    return np.cos(angles_PF), np.sin(angles_PF)
