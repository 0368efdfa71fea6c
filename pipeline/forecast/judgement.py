"""What the sizes of a forecast forbid, and what they only make tight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pipeline.errors import Problem
from pipeline.forecast.disk import DiskForecast
from pipeline.forecast.host import StageForecast
from pipeline.forecast.machine import Machine
from pipeline.forecast.sizes_text import exact_text

_TIGHT: Final = 0.9
"""Of what is free: above, it is tight."""
_CERTAIN: Final = 0.75
"""Of a forecast of memory, which may be off by a quarter: more than the machine has of it is certain."""


@dataclass(frozen=True)
class HostForecast:
    """What a run takes on this machine.

    Attributes:
        stages: those still to be made, in order.
    """

    stages: tuple[StageForecast, ...]
    disk: DiskForecast
    machine: Machine

    @property
    def seconds(self) -> tuple[float, float]:
        """Of all stages: from, to."""
        low = sum(stage.seconds[0] for stage in self.stages)
        return low, sum(stage.seconds[1] for stage in self.stages)

    @property
    def ram_peak(self) -> int:
        """Of the stage that takes most."""
        return max((stage.ram_peak for stage in self.stages), default=0)


def host_problems(host: HostForecast) -> Iterator[Problem]:
    """What cannot work here: memory that the machine has not, a disk that is too small."""
    machine = host.machine
    for stage in host.stages:
        if stage.ram_per_process * _CERTAIN > machine.memory_bytes:
            what = (
                f"stage {stage.stage} needs about {exact_text(stage.ram_per_process)} of memory, this "
                f"machine has {exact_text(machine.memory_bytes)}"
            )
            yield Problem("memory", what, fix=_memory_fix(stage))
    if host.disk.peak > machine.free_disk_bytes:
        what = (
            f"the run needs {exact_text(host.disk.peak)}, {exact_text(machine.free_disk_bytes)} are "
            f"free; most during {host.disk.fullest}"
        )
        fix = "make room, or run in a directory on a larger disk"
        if exact_text(host.disk.peak_if_dropped) != exact_text(host.disk.peak):
            fix += f"; with run.keep: needed it takes {exact_text(host.disk.peak_if_dropped)}"
        yield Problem(f"disk of {machine.disk}", what, fix=fix)


def host_notes(host: HostForecast, max_rank_bytes: int | None = None) -> Iterator[str]:
    """What may work here, and may not.

    Args:
        max_rank_bytes: memory that the ranks of a build may take together; None: what is free.
    """
    for stage in host.stages:
        largest = max(stage.rank_ram, default=0) if stage.stage == "build" else 0
        if max_rank_bytes is not None and largest > max_rank_bytes:
            yield (
                f"build.max_memory_gb {max_rank_bytes / 1e9:.4g}: a rank of the build needs about "
                f"{exact_text(largest)}; ranks run one at a time, above that limit"
            )
    machine, worst = host.machine, max(host.stages, key=lambda one: one.ram_peak, default=None)
    if worst is None:
        return
    is_impossible = worst.ram_per_process * _CERTAIN > machine.memory_bytes
    if worst.ram_peak > _TIGHT * machine.free_memory_bytes and not is_impossible:
        yield (
            f"memory is tight: stage {worst.stage} needs about {exact_text(worst.ram_peak)}, "
            f"{exact_text(machine.free_memory_bytes)} are free now"
        )
    if _TIGHT * machine.free_disk_bytes < host.disk.peak <= machine.free_disk_bytes:
        yield (
            f"the disk is tight: the run needs {exact_text(host.disk.peak)}, "
            f"{exact_text(machine.free_disk_bytes)} are free"
        )


def _memory_fix(stage: StageForecast) -> str:
    if stage.stage == "build":
        return "more mapping.tp or pp makes each rank's engine smaller; or a larger machine"
    return "a larger machine; stage results can be made there and copied with engines/.store"
