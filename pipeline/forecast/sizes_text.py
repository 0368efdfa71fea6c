"""Sizes and times as short words."""

from __future__ import annotations

from pipeline.forecast.rates import Seconds


def size_text(count: float) -> str:
    """12 MB, 7.2 GB: two digits suffice beside others."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.1f} {unit}" if abs(value) < 10 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def exact_text(count: float) -> str:
    """7.20 GB, 12.30 MB: decimal units, as disks and downloads count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def band_text(seconds: Seconds) -> str:
    """20 s - 3 min."""
    low, high = map(_duration, seconds)
    return low if low == high else f"{low} - {high}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
