"""Cosine and sine tables of rotary position embedding.

Shapes: P positions, R rotated channels of a head, F = R / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 model card: wavelengths longer than original/low_freq_factor are divided by
    `factor`, shorter than original/high_freq_factor are kept, and those between are blended
    linearly in the number of turns within the original context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class LongScaling:
    """Phi-3's longrope: one divisor per frequency, of two sets, and a magnitude of the tables.

    The set is chosen by the engine: a cache of more than `original_max_position_embeddings`
    positions uses the long one for every sequence, because keys that are in the cache cannot be
    rotated again. transformers chooses anew in each call, by the longest sequence in it; short
    sequences in a long engine therefore differ from it, and agree in an engine of the original length.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    short_magnitude: float
    long_magnitude: float


Scaling = LinearScaling | Llama3Scaling | LongScaling


@dataclass(frozen=True)
class Rotary:
    """Rotation of query and key heads.

    Attributes:
        num_channels: R, the first channels of a head; the others stay as they are.
        base: of the frequencies.
    """

    num_channels: int
    base: float = 10000.0
    scaling: Scaling | None = None


def rotary_tables(rotary: Rotary, num_positions: int) -> tuple[Floats, Floats]:
    """(cos, sin), each [P, F] float64, for positions 0..P-1 of an engine with P positions."""
    frequencies_F = inverse_frequencies(rotary, num_positions)
    angles_PF = np.outer(np.arange(num_positions, dtype=np.float64), frequencies_F)
    magnitude = 1.0
    if isinstance(rotary.scaling, LongScaling):
        is_long = _is_long(rotary.scaling, num_positions)
        magnitude = rotary.scaling.long_magnitude if is_long else rotary.scaling.short_magnitude
    return np.cos(angles_PF) * magnitude, np.sin(angles_PF) * magnitude


def inverse_frequencies(rotary: Rotary, num_positions: int) -> Floats:
    """Angle per position of each pair of channels, [F], float64, radians."""
    exponents_F = np.arange(0, rotary.num_channels, 2, dtype=np.float64) / rotary.num_channels
    frequencies_F: Floats = np.power(float(rotary.base), -exponents_F)
    scaling = rotary.scaling
    if scaling is None:
        return frequencies_F
    if isinstance(scaling, LinearScaling):
        return frequencies_F / scaling.factor
    if isinstance(scaling, LongScaling):
        is_long = _is_long(scaling, num_positions)
        factors = scaling.long_factors if is_long else scaling.short_factors
        return frequencies_F / np.asarray(factors, np.float64)
    return _blended(frequencies_F, scaling)


def _is_long(scaling: LongScaling, num_positions: int) -> bool:
    return num_positions > scaling.original_max_position_embeddings


def _blended(frequencies_F: Floats, scaling: Llama3Scaling) -> Floats:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_F = scaling.original_max_position_embeddings * frequencies_F / (2 * math.pi)
    kept_F: Floats = np.clip((turns_F - low) / (high - low), 0.0, 1.0)
    blended_F: Floats = frequencies_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    return blended_F
