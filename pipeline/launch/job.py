"""What one rank runs, what it leaves behind for the one who waits, and how its end is told."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.dead_process import death_problem
from pipeline.errors import PipelineError, Problem, StageError, error_from_json

LAST_WORDS = "trtpipe-error "
"""Before the JSON of an error that a rank can leave nowhere else: mpirun passes the line on."""

_FEWER_AT_ONCE = (
    "usually the kernel ran out of memory: close other programs, let fewer ranks run at once "
    "(build.max_memory_gb, or launch: sequential), or use a larger machine"
)


@dataclass(frozen=True)
class RankJob:
    """What one rank runs: `python -m module argument`.

    Attributes:
        log_path: takes standard output and error.
        error_path: where the module leaves `error_to_json` of a user's error; it need not.
        name: how errors call it; "" is `rank {rank}`.
        own_process: under mpirun, the module runs in a child of the rank's MPI process, which sees how
            it ends. For modules that do not talk to other ranks; they may have to wait for memory.
        memory_bytes: expected peak of host memory; 0 starts at once. Only with own_process.
        progress_path: where the module appends its progress (RankProgress); "": nowhere.
        inputs: paths that must be there on whatever host the rank runs on.
    """

    rank: int
    module: str
    argument: str
    log_path: str
    error_path: str
    name: str = ""
    own_process: bool = False
    memory_bytes: int = 0
    progress_path: str = ""
    inputs: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """What a problem of it starts with."""
        return self.name or f"rank {self.rank}"


@dataclass(frozen=True)
class Witness:
    """What is known of a rank's process under MPI.

    Attributes:
        pid: of the MPI process.
        code: as subprocess has it, negative for a signal; None while it runs.
    """

    host: str
    pid: int
    code: int | None = None

    @classmethod
    def of_this_process(cls, code: int | None = None) -> Witness:
        """Of the process that asks."""
        return cls(socket.gethostname(), os.getpid(), code)

    def write(self, directory: Path, index: int) -> None:
        """Leave it for the job of that index; never half-written."""
        fresh = directory / f"{index}.new"
        fresh.write_text(json.dumps(asdict(self)), "utf-8")
        fresh.replace(_witness_path(directory, index))


def read_witness(directory: Path, index: int) -> Witness | None:
    """What the job of that index left; None before it has started."""
    try:
        text = _witness_path(directory, index).read_text("utf-8")
    except FileNotFoundError:
        return None
    return Witness(**json.loads(text))


def first_failure(directory: Path, count: int) -> int | None:
    """Index of the job that failed first; None if none has said so."""
    failed = [
        (_witness_path(directory, index).stat().st_mtime_ns, index)
        for index in range(count)
        if (witness := read_witness(directory, index)) is not None and witness.code
    ]
    return min(failed)[1] if failed else None


def _witness_path(directory: Path, index: int) -> Path:
    return directory / f"{index}.json"


def failure(job: RankJob, code: int, host: str = "") -> PipelineError:
    """The rank's own error, of its own kind; else a StageError with the end of its log.

    Args:
        code: as subprocess has it.
        host: where it ran, when that is not this host.
    """
    where = f"{job.where} on {host}" if host and host != socket.gethostname() else job.where
    error_path = Path(job.error_path)
    if error_path.exists():
        error = error_from_json(json.loads(error_path.read_text("utf-8")))
        return type(error)(
            replace(problem, where=f"{where}: {problem.where}") for problem in error.problems
        )
    problem = death_problem(where, code, Path(job.log_path))
    if code == -signal.SIGKILL and job.own_process:
        problem = replace(problem, fix=_FEWER_AT_ONCE)
    return StageError(problem)


def missing_input(job: RankJob) -> Problem | None:
    """The first input that is not there on this host."""
    for path in job.inputs:
        if not Path(path).exists():
            return unshared(job.where, path)
    return None


def unshared(where: str, path: str) -> Problem:
    """What a rank on a host without the store says."""
    return Problem(
        f"{where} on {socket.gethostname()}",
        f"{path} is not there",
        fix="the store must be shared: every host of the job needs the build's directory at the same "
        "path (NFS, for example); or leave out build.hostfile and build on one host",
    )
