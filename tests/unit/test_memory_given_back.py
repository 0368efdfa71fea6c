"""Freed memory goes back to the system."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.memory import give_back_freed

_BLOCK_BYTES = 100_000  # below what the C library maps block by block
_NUM_BLOCKS = 2000


def test_freed_blocks_between_blocks_in_use_are_given_back() -> None:
    blocks = [bytes([1]) * _BLOCK_BYTES for _ in range(_NUM_BLOCKS)]
    full = _anonymous_bytes()
    kept = blocks[:: _NUM_BLOCKS // 10]  # so that the top of the heap alone is not enough
    del blocks
    give_back_freed()
    assert len(kept) == 10
    assert full - _anonymous_bytes() > 0.8 * _BLOCK_BYTES * _NUM_BLOCKS


def _anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024
