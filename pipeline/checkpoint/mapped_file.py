"""Gives back the pages of a mapped file that were read, so that a process does not hold it whole."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # mmap.MADV_DONTNEED, which is not there on every platform


class MappedFile:
    """Where this process has mapped a file; nothing where that cannot be known (not Linux)."""

    def __init__(self, path: Path) -> None:
        self._ranges = _ranges(os.path.realpath(path))

    def forget(self, address: int, num_bytes: int) -> None:
        """Unmap the whole pages of [address, address + num_bytes) until they are read again.

        They then come from the page cache, or the disk. Bytes outside the mapping of the file are left
        alone: of other memory the kernel would lose the content. Nobody may have written to the mapping.
        """
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop and any(low <= start and stop <= high for low, high in self._ranges):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)


def _ranges(path: str) -> list[tuple[int, int]]:
    if not sys.platform.startswith("linux") or not _MAPS.exists():
        return []
    found = []
    for line in _MAPS.read_text("utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)  # range, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5] == path:
            low, _, high = fields[0].partition("-")
            found.append((int(low, 16), int(high, 16)))
    return found
