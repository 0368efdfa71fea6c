"""Entry of each process under mpirun: `python -m mpi4py -m pipeline.launch.rank_process JOBS MPI_KIND`.

Runs the job of its own rank. A rank that fails in plain Python would leave the others hanging; under
`-m mpi4py` it aborts the whole job.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import PipelineError, Problem, StageError, ToolError, error_to_json
from pipeline.launch.job import LAST_WORDS, RankJob, Witness, missing_input, unshared
from pipeline.launch.memory_queue import MemoryQueue, too_large
from pipeline.launch.mpirun import library_problem, without_mpi
from pipeline.launch.progress import RankProgress
from pipeline.orphans import die_with_parent, end_with_parent

_POLL_S = 0.1


def main(jobs_path: str, kind: str) -> int:
    """Run the job of this process's rank; its exit code, 1 for one that was killed."""
    die_with_parent(os.getppid())
    mpi = _started_mpi(kind)
    comm = mpi.COMM_WORLD
    rank = comm.Get_rank()
    content = _content(jobs_path, rank)
    jobs = [RankJob(**job) for job in content["jobs"]]
    if comm.Get_size() != len(jobs):
        what = f"mpirun has started {comm.Get_size()} processes for {len(jobs)} ranks"
        _end_with(StageError(Problem("mpirun", what)))
    job, witness_dir = jobs[rank], Path(content["witness_dir"])
    problem = missing_input(job)
    if problem is not None:
        _end_with(StageError(problem))
    Witness.of_this_process().write(witness_dir, rank)
    if not job.own_process:
        return _run_here(job, rank, witness_dir)
    same_host = comm.Split_type(mpi.COMM_TYPE_SHARED).allgather(rank)
    path = witness_dir / f"memory-{same_host[0]}.json"
    queue = MemoryQueue(path, same_host, content["max_memory_bytes"])
    code = _run_in_child(job, rank, queue)
    Witness.of_this_process(code).write(witness_dir, rank)
    if code == 0:
        _wait_for_others(comm)
    return code if code >= 0 else 1


def _started_mpi(kind: str) -> Any:
    """The module mpi4py.MPI, initialised, once it is known to be of mpirun's kind."""
    import mpi4py

    # The wrong library would end the process in its own way, or see a world of one.
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    from mpi4py import MPI

    problem = library_problem(kind, MPI.get_vendor()[0])
    if problem is not None:
        _end_with(ToolError(problem))
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def _content(jobs_path: str, rank: int) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(Path(jobs_path).read_text("utf-8"))
    except FileNotFoundError:
        _end_with(StageError(unshared(f"rank {rank}", jobs_path)))
    return content


def _end_with(error: PipelineError) -> NoReturn:
    """Leave an error to the one who reads mpirun's output, and end all ranks."""
    print(f"{LAST_WORDS}{json.dumps(error_to_json(error))}", flush=True)
    sys.exit(int(error.exit_code))


def _run_here(job: RankJob, rank: int, witness_dir: Path) -> int:
    """Run the module in this process, so that it can talk to the other ranks."""
    with Path(job.log_path).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [job.module, job.argument]
    code = 1
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        Witness.of_this_process(code).write(witness_dir, rank)
    return code


def _run_in_child(job: RankJob, rank: int, queue: MemoryQueue) -> int:
    """Wait for memory, run the module in a child of its own, and see how it ends."""
    progress = RankProgress(Path(job.progress_path) if job.progress_path else None)
    if job.memory_bytes > queue.bound():
        progress.say(too_large(job.memory_bytes, queue.bound()))
    with (
        queue.turn(rank, job.memory_bytes, progress.status),
        Path(job.log_path).open("ab") as log,
    ):
        progress.status("starts")
        return subprocess.run(
            [sys.executable, "-m", job.module, job.argument],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=without_mpi(os.environ),
            preexec_fn=end_with_parent,
            check=False,
        ).returncode


def _wait_for_others(comm: Any) -> None:
    """MPI_Finalize waits for all ranks; some MPIs spin meanwhile, and others still compile."""
    barrier = comm.Ibarrier()
    while not barrier.Test():
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
