"""Machines to plan for, so that no test depends on what is free here today."""

from __future__ import annotations

from pathlib import Path

from pipeline.forecast.machine import Machine

AMPLE = Machine(
    cores=2,
    memory_bytes=10**13,
    free_memory_bytes=10**13,
    free_disk_bytes=10**14,
    disk=Path("/"),
)
SMALL = Machine(
    cores=2,
    memory_bytes=24 * 10**9,
    free_memory_bytes=20 * 10**9,
    free_disk_bytes=40 * 10**9,
    disk=Path("/"),
)
