"""How much memory this machine, or the container around us, has left."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """What can be taken without swapping: the least of the machine's and every enclosing cgroup's."""
    return min([_machine_free(Path("/proc/meminfo")), *_cgroups_free(_CGROUP_ROOT, _own_cgroup())])


def give_back_freed() -> None:
    """Hand memory that was freed back to the system, where the C library can (glibc).

    It keeps what lies between blocks still in use: 0.7 GB after ten quantized layers of the size of
    Llama-2-13B's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _machine_free(meminfo: Path) -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text("ascii"), re.MULTILINE)
    assert found, f"{meminfo} has had MemAvailable since Linux 3.14"
    return int(found[1]) * 1024


def _own_cgroup() -> str:
    """Path of the own cgroup below the root, version 2; empty when there is none."""
    lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    return next((line[4:] for line in lines if line.startswith("0::/")), "")


def _cgroups_free(root: Path, own: str) -> Iterator[int]:
    """Limit minus use of every group with a limit; cached file pages are given back when needed."""
    group = root / own
    for directory in (group, *group.parents):
        limit = directory / "memory.max"
        if limit.is_file() and (text := limit.read_text("ascii").strip()) != "max":
            used = int((directory / "memory.current").read_text("ascii"))
            statistics = (directory / "memory.stat").read_text("ascii")
            cached = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
            yield max(int(text) - used + (int(cached[1]) if cached else 0), 0)
        if directory == root:
            return


def total_memory_bytes() -> int:
    """What this machine, or the container around us, has at all."""
    found = re.search(
        r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text("ascii"), re.MULTILINE
    )
    assert found, "/proc/meminfo has MemTotal"
    limits = _cgroup_limits(_CGROUP_ROOT, _own_cgroup())
    return min([int(found[1]) * 1024, *limits])


def _cgroup_limits(root: Path, own: str) -> Iterator[int]:
    group = root / own
    for directory in (group, *group.parents):
        limit = directory / "memory.max"
        if limit.is_file() and (text := limit.read_text("ascii").strip()) != "max":
            yield int(text)
        if directory == root:
            return
