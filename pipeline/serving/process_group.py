"""Ending a process with all its descendants of the same group."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

GONE_S = 5.0


def end_group(group: int) -> None:
    """Kill every process of `group` and return when none runs any more (at most after GONE_S)."""
    deadline = time.monotonic() + GONE_S
    while members(group) and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Process ids of the living members of `group`, from /proc; zombies do not count."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            stat = (directory / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        # "pid (name) state parent group ...": the name may hold anything, even parentheses.
        state, _parent, process_group = stat.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state != "Z":
            found.append(int(directory.name))
    return found
