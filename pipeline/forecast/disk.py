"""Bytes on the disk over a whole run: every artifact as it comes, and goes if it need not stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

_MORE = 1.02
"""By so much the peak must grow for another step to be named."""


@dataclass(frozen=True)
class StepBytes:
    """One step of a run that is still to be made, or the artifact of one that is done.

    Attributes:
        reads: names of the steps whose artifacts it reads.
        written: bytes of its artifact that are new; 0 for one that is done.
        beside: bytes that it needs on the disk only while it runs.
    """

    name: str
    reads: tuple[str, ...]
    written: int
    beside: int = 0


@dataclass(frozen=True)
class DiskForecast:
    """Bytes beyond what lies there now.

    Attributes:
        peak: at the fullest moment.
        kept: when the run has ended.
        fullest: the step during which the peak comes; "" without steps.
        peak_if_dropped: the peak with `run.keep: needed`.
    """

    peak: int
    kept: int
    fullest: str
    peak_if_dropped: int


def disk_forecast(
    steps: Sequence[StepBytes], published: Collection[str], *, keep_all: bool
) -> DiskForecast:
    """Walk the steps in order.

    Args:
        published: steps whose artifacts are linked where the user looks for them: they stay.
        keep_all: `run.keep: all`; otherwise an artifact goes when no later step reads it.
    """
    dropped_peak, kept, fullest = _walk(steps, published, keep_all=False)
    if not keep_all:
        return DiskForecast(dropped_peak, kept, fullest, dropped_peak)
    peak, kept, fullest = _walk(steps, published, keep_all=True)
    return DiskForecast(peak, kept, fullest, dropped_peak)


def _walk(
    steps: Sequence[StepBytes], published: Collection[str], *, keep_all: bool
) -> tuple[int, int, str]:
    """Peak, what is left, and the step of the peak."""
    present: dict[str, int] = {}
    peak, fullest = 0, ""
    for index, step in enumerate(steps):
        during = sum(present.values()) + step.written + step.beside
        if during > _MORE * peak:
            fullest = step.name
        peak = max(peak, during)
        present[step.name] = step.written
        if not keep_all:
            _drop(present, steps[index + 1 :], published)
    return peak, sum(present.values()), fullest


def _drop(present: dict[str, int], later: Sequence[StepBytes], published: Collection[str]) -> None:
    needed = {name for step in later for name in step.reads}
    for name in [name for name in present if name not in needed and name not in published]:
        del present[name]
