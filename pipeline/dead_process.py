"""A child process that ended without saying why: what can still be told of it."""

from __future__ import annotations

import signal
from pathlib import Path

from pipeline.errors import Problem

_LOG_TAIL_LINES = 15


def death_problem(where: str, code: int, log_path: Path) -> Problem:
    """How a process ended, and the last lines that it left.

    Args:
        where: what it was doing, such as "rank 3".
        code: as subprocess has it: negative for a signal.
        log_path: its standard output and error.
    """
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    fix = ""
    if code == -signal.SIGKILL:
        fix = "usually the kernel ran out of memory: close other programs, or use a larger machine"
    tail = last_lines(log_path.read_text("utf-8", errors="replace"))
    log = f"the end of its log:\n{tail}\n" if tail else "its log is empty"
    return Problem(where, f"{cause}; {log}", fix=fix)


def last_lines(text: str) -> str:
    """The last lines that are not blank, indented."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-_LOG_TAIL_LINES:])
