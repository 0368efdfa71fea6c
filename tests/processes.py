"""Whether a process that nobody waits for has ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_SOON_S = 10.0


def ends_soon(pid: int) -> bool:
    """Whether it ends by itself within seconds; one that does not is killed."""
    deadline = time.monotonic() + _SOON_S
    while _is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True


def _is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
