"""Where ranks run: this host, the hosts of a file, or those of a Slurm allocation."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import Problem
from pipeline.launch.mpirun import MpiKind, too_few_slots

_WORLD_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""What says into how many processes a program was started, and by whom."""
_OPEN_MPI_SLOTS = re.compile(r"\b(max_)?slots\s*=")
_SLOTS = re.compile(r"\bslots\s*=\s*(\S+)")
_MPICH_SLOTS = re.compile(r"^\S+:\d+\b")


def hostfile_problem(path: Path, kind: MpiKind | None, count: int = 1) -> Problem | None:
    """What keeps mpirun from reading a file of hosts, or from starting ranks on them.

    Args:
        kind: which mpirun will read it; None while that is not known.
        count: ranks to be started.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        return Problem(str(path), f"cannot be read: {what}")
    hosts = [line for line in (line.partition("#")[0].strip() for line in lines) if line]
    if not hosts:
        return Problem(str(path), "names no host", "a host name on each line")
    for line in hosts:
        if kind == "mpich" and _OPEN_MPI_SLOTS.search(line):
            return Problem(
                str(path), f"`{line}` is Open MPI's way, and mpirun is MPICH's", "host:4"
            )
        if kind == "open mpi" and _MPICH_SLOTS.match(line):
            what = f"`{line}` is MPICH's way, and mpirun is Open MPI's"
            return Problem(str(path), what, "host slots=4")
    return _slots_problem(path, hosts, count) if kind == "open mpi" else None


def _slots_problem(path: Path, hosts: Sequence[str], count: int) -> Problem | None:
    """Of Open MPI's `slots=`. A host without it has as many as it has cores, which only it knows."""
    total = 0
    are_all_known = True
    for line in hosts:
        found = _SLOTS.search(line)
        if found is None:
            are_all_known = False
        elif not found[1].isdecimal() or int(found[1]) == 0:
            return Problem(str(path), f"`{line}` has no number of slots", "host slots=4")
        else:
            total += int(found[1])
    return too_few_slots(path, count) if are_all_known and total < count else None


def started_too_often(environment: Mapping[str, str] = os.environ) -> Problem | None:
    """That mpirun or srun has started this very program several times: each would build everything."""
    for name, starter in _WORLD_SIZES.items():
        size = environment.get(name, "1")
        if size.isdecimal() and int(size) > 1:
            return Problem(
                "command line",
                f"{starter} has started this command {size} times ({name}={size})",
                fix="start it once: with build.launch: mpirun it starts one process for each rank "
                "itself",
            )
    return None
