"""The machine that a build runs on, as far as it can stand in the way."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.disk import nearest_directory
from pipeline.memory import free_memory_bytes, total_memory_bytes


@dataclass(frozen=True)
class Machine:
    """This host, or one to plan for.

    Attributes:
        cores: that this process may use.
        memory_bytes: of the machine or the container around us.
        free_memory_bytes: of it, now.
        free_disk_bytes: where artifacts go, now.
        disk: that place.
    """

    cores: int
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    disk: Path


def this_machine(store_root: Path) -> Machine:
    """What is here and free now; `store_root` need not exist yet."""
    directory = nearest_directory(store_root)
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=total_memory_bytes(),
        free_memory_bytes=free_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(directory).free,
        disk=directory,
    )
