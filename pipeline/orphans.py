"""A child process that must not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import sys


def die_with_parent(parent_pid: int) -> None:
    """Get SIGTERM when the parent ends, however it ends (Linux only; elsewhere nothing happens).

    A compiler that lives on after its run was killed would write into a directory whose lock is gone.

    Args:
        parent_pid: the parent's process id, taken by the parent: it may have died before this call.
    """
    end_with_parent()
    if sys.platform.startswith("linux") and os.getppid() != parent_pid:
        sys.exit(1)


def end_with_parent() -> None:
    """`die_with_parent` for a program that is not ours: called between fork and exec."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
