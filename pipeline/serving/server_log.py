"""Why a server did not start or ended, out of its log.

Triton prints the reason between tables of settings: as an E line (`E1120 14:37:33.650482 10527
model_lifecycle.cc:642] "failed to load ..."`, newlines escaped), and for a config.pbtxt that does not
parse, only protobuf knows line and column and prints them as a line of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

TAIL_LINES = 15
MAX_BYTES = 256 * 1024

_ERROR_LINE = re.compile(r'^E\d{4} \S+ \d+ \S+\] "?(.*?)"?$')
_PROTOBUF_LINE = re.compile(r"^\[libprotobuf ERROR [^\]]*\] (.*)$")
_LAST_LINE = re.compile(r"^error: (.*)$")
_FRAMES = re.compile(r"\s+At:\s+(.*)", re.DOTALL)
_HARMLESS = (
    "CudaDriverHelper has not been initialized",  # there is no GPU
    "Failed to create instance",  # said again, with the model's name
)


def explain(log_path: Path) -> str:
    """The reasons in the log, one per line; its tail when there is none."""
    reasons: list[str] = []
    for line in _text(log_path).splitlines():
        reason = _reason(line)
        if reason and reason not in reasons and not any(text in reason for text in _HARMLESS):
            reasons.append(reason)
    return "\n".join(reasons) or tail(log_path)


def tail(log_path: Path) -> str:
    """The last lines of the log, without the tables that Triton draws."""
    lines = [
        line for line in _text(log_path).splitlines() if line and not line.startswith(("|", "+"))
    ]
    return "\n".join(lines[-TAIL_LINES:])


def _reason(line: str) -> str:
    for pattern in (_ERROR_LINE, _PROTOBUF_LINE, _LAST_LINE):
        match = pattern.match(line)
        if match:
            return _with_first_frame(match[1].replace("\\n", "\n"))
    return ""


def _with_first_frame(reason: str) -> str:
    """Of a Python traceback keep where it was raised, which the backend lists first."""
    match = _FRAMES.search(reason)
    if match is None:
        return reason.strip()
    return f"{reason[: match.start()].strip()} (at {match[1].splitlines()[0].strip()})"


def _text(log_path: Path) -> str:
    """The end of the log; a model that prints megabytes must not make an error message slow."""
    with log_path.open("rb") as log:
        size = log.seek(0, 2)
        log.seek(max(0, size - MAX_BYTES))
        return log.read().decode("utf-8", errors="replace")
