"""Files that we did not make: their content digests, remembered between runs.

Hashing a 26 GB checkpoint takes a minute, planning must take less than a second. So a digest is kept
with the size, modification time and inode of its file, and is valid while they stay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.store import canonical_json, file_sha256

HASH_AT_ONCE_BYTES = 64 << 20
"""Up to so much unhashed content `plan` hashes itself: about a tenth of a second."""

CHECKPOINT_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

_PICKLE_PATTERN = "pytorch_model*.bin"
"""PyTorch's own files count only where there are no safetensors."""


def checkpoint_files(directory: Path) -> list[Path]:
    """Files of a Hugging Face directory that can influence an engine; no README, no hidden file."""
    found = {path for pattern in CHECKPOINT_PATTERNS for path in directory.glob(pattern)}
    if not any(path.suffix == ".safetensors" for path in found):
        found |= set(directory.glob(_PICKLE_PATTERN))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


class DigestCache:
    """sha256 of external files, kept in one JSON file. Losing it costs time, never correctness."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read_entries(path)

    def peek(self, path: Path) -> str | None:
        """The digest if it is known and the file has not been touched since."""
        entry = self._entries.get(str(path.resolve()))
        if entry is None or entry["stamp"] != _stamp(path):
            return None
        return str(entry["sha256"])

    def unhashed_bytes(self, paths: Iterable[Path]) -> int:
        """How many bytes would have to be read to know all digests."""
        return sum(path.stat().st_size for path in paths if self.peek(path) is None)

    def digest(self, path: Path, on_read: Callable[[Path], None] = lambda _: None) -> str:
        """The digest, computed when it is not known; `on_read` is called before a computation."""
        known = self.peek(path)
        if known is not None:
            return known
        on_read(path)
        stamp = _stamp(path)
        sha256 = file_sha256(path)
        self._entries[str(path.resolve())] = {"stamp": stamp, "sha256": sha256}
        return sha256

    def save(self) -> None:
        """Write the cache, replacing the old file in one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entries = {**_read_entries(self._path), **self._entries}  # of runs beside this one
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(entries, indent=1, sort_keys=True), "utf-8")
        fresh.replace(self._path)


def _read_entries(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def combined_digest(files: dict[str, str]) -> str:
    """One digest of several files: name -> sha256."""
    return hashlib.sha256(canonical_json(files)).hexdigest()
