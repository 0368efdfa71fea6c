"""The compiler's log: kept on disk, and judged line by line.

The parser and the builder report dropped inputs and options in the log only, never as an exception,
so every warning that is not known to be harmless fails the build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TextIO

# The graph's index inputs are int64 by contract; TensorRT-RTX takes them as they are.
KNOWN_WARNINGS = (re.compile(r"Make sure input \w+ has Int64 binding\.$"),)

_UNUSED_INPUT = re.compile(r"unused input", re.IGNORECASE)
_LISTING_START = "Layers:\n"
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
_GRAVE = ("INTERNAL_ERROR", "ERROR", "WARNING")


@dataclass
class CompilerLog:
    """Collects what the checks need while every line goes to `file`.

    Attributes:
        unexpected: lines that must fail the build.
        listing: the layer listing that the builder prints at DETAILED verbosity; empty until then.
        activation_bytes: device memory for activations, as the builder reports it.
    """

    file: TextIO
    unexpected: list[str] = field(default_factory=list)
    listing: str = ""
    activation_bytes: int | None = None

    def add(self, severity: str, message: str) -> None:
        """One message, of severity INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""
        self.file.write(f"{severity} {message}\n")
        if is_unexpected(severity, message):
            self.unexpected.append(f"{severity}: {message}")
        if message.startswith(_LISTING_START):
            self.listing = message
        found = _ACTIVATION.search(message)
        if found:
            self.activation_bytes = int(found.group(1))


def is_unexpected(severity: str, message: str) -> bool:
    """Whether a message must fail the build."""
    if _UNUSED_INPUT.search(message):
        return True
    if severity not in _GRAVE:
        return False
    known = any(pattern.search(message) for pattern in KNOWN_WARNINGS)
    return not (severity == "WARNING" and known)
