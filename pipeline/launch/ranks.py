"""Runs ranks to their end: in turn, under mpirun, or all at once without MPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from pipeline.build_config import LaunchMode
from pipeline.dead_process import last_lines
from pipeline.errors import PipelineError, Problem, StageError, error_from_json
from pipeline.launch.job import LAST_WORDS, RankJob, failure, first_failure, read_witness
from pipeline.launch.memory_queue import too_large
from pipeline.launch.mpirun import find_mpirun, refusal, reported_death, without_mpi
from pipeline.launch.progress import ProgressFiles, RanksView
from pipeline.memory import free_memory_bytes
from pipeline.orphans import end_with_parent
from pipeline.progress import Progress

_POLL_S = 0.02
_END_S = 5.0
_KEPT_LINES = 200


def run_ranks(
    jobs: Sequence[RankJob],
    mode: LaunchMode,
    jobs_path: Path,
    on_done: Callable[[int], None] = lambda index: None,
    *,
    hostfile: Path | None = None,
    max_memory_bytes: int | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run every rank to its end.

    Args:
        jobs: in order; under mpirun the first has rank 0 of MPI_COMM_WORLD.
        mode: "sequential" or "mpirun".
        jobs_path: scratch file that hands the jobs to mpirun's processes; removed afterwards.
        on_done: called with the index of each job that has finished.
        hostfile: the hosts of mpirun; None: this one, or those of the Slurm allocation.
        max_memory_bytes: what jobs with own_process may take at the same time on one host; None: what
            is free there.
        on_note: called with what people should know beforehand.
        on_tick: called many times a second.

    Raises:
        ToolError: mpirun or mpi4py is missing, or they are of different MPIs.
        PipelineError: a rank failed; it is named, with its own error or the end of its log. The others
            were ended.
    """
    if mode == "mpirun":
        _MpiRun(jobs, jobs_path, hostfile, max_memory_bytes).run(on_done, on_tick)
        return
    for index, job in enumerate(jobs):
        bound = free_memory_bytes() if max_memory_bytes is None else max_memory_bytes
        if job.memory_bytes > bound:
            on_note(f"{job.where}: {too_large(job.memory_bytes, bound)}")
        _run_together([job], lambda _: None, on_tick)
        on_done(index)


def run_in_view(
    jobs: Sequence[RankJob],
    mode: LaunchMode,
    jobs_path: Path,
    progress: Progress,
    *,
    hostfile: Path | None,
    max_memory_bytes: int | None = None,
) -> None:
    """As `run_ranks`, with the progress of all ranks, from the files of their jobs, in one line."""
    view = RanksView([job.where for job in jobs], progress)
    files = ProgressFiles([Path(job.progress_path) for job in jobs], view.on_event)

    def on_tick() -> None:
        files.poll()
        view.show()

    run_ranks(
        jobs,
        mode,
        jobs_path,
        view.done,
        hostfile=hostfile,
        max_memory_bytes=max_memory_bytes,
        on_note=progress.say,
        on_tick=on_tick,
    )
    files.finish()


def run_at_once(jobs: Sequence[RankJob], on_tick: Callable[[], None] = lambda: None) -> None:
    """Run all jobs at the same time, without MPI: for work that needs no other rank.

    Raises:
        StageError: one failed; the others were ended.
    """
    _run_together(jobs, lambda index: None, on_tick)


def processes_that_fit(bytes_each: int, at_most: int) -> int:
    """How many processes to run at once: as cores and half of the free memory allow, at least one."""
    fitting = free_memory_bytes() // 2 // bytes_each
    return max(1, min(at_most, fitting, len(os.sched_getaffinity(0))))


def _run_together(
    jobs: Sequence[RankJob], on_done: Callable[[int], None], on_tick: Callable[[], None]
) -> None:
    running: list[tuple[int, RankJob, subprocess.Popen[bytes]]] = []
    try:
        for index, job in enumerate(jobs):
            with Path(job.log_path).open("ab") as log:
                command = [sys.executable, "-m", job.module, job.argument]
                # Before the module's own imports, which take longer than a kill.
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, preexec_fn=end_with_parent
                )
                running.append((index, job, process))
        unfinished = list(running)
        while unfinished:
            on_tick()
            for index, job, process in list(unfinished):
                code = process.poll()
                if code is None:
                    continue
                if code:
                    raise failure(job, code)
                unfinished.remove((index, job, process))
                on_done(index)
            time.sleep(_POLL_S)
    finally:
        for _, _, process in running:
            process.kill()  # does nothing to one that has ended
            process.wait()


class _MpiRun:
    """Jobs under one mpirun."""

    def __init__(
        self,
        jobs: Sequence[RankJob],
        jobs_path: Path,
        hostfile: Path | None,
        max_memory_bytes: int | None,
    ) -> None:
        self._jobs = list(jobs)
        self._jobs_path = jobs_path
        self._witness_dir = jobs_path.with_suffix(".ranks")
        self._hostfile = hostfile
        self._max_memory_bytes = max_memory_bytes
        self._done: set[int] = set()

    def run(self, on_done: Callable[[int], None], on_tick: Callable[[], None]) -> None:
        mpirun = find_mpirun()
        command = mpirun.command(len(self._jobs), self._hostfile)
        command += [sys.executable, "-m", "mpi4py", "-m", "pipeline.launch.rank_process"]
        command += [str(self._jobs_path.resolve()), mpirun.kind]
        self._witness_dir.mkdir()
        content = {
            "jobs": [asdict(job) for job in self._jobs],
            "witness_dir": str(self._witness_dir.resolve()),
            "max_memory_bytes": self._max_memory_bytes,
        }
        self._jobs_path.write_text(json.dumps(content), "utf-8")
        try:
            code, output = self._wait(command, on_done, on_tick)
            if code or len(self._done) < len(self._jobs):
                raise self._failure(code, output)
        finally:
            self._jobs_path.unlink()
            shutil.rmtree(self._witness_dir, ignore_errors=True)

    def _wait(
        self, command: list[str], on_done: Callable[[int], None], on_tick: Callable[[], None]
    ) -> tuple[int, str]:
        """mpirun's exit code and the end of what it and its ranks have said."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=without_mpi(os.environ),
            preexec_fn=end_with_parent,
        )
        assert process.stdout is not None
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                on_tick()
                self._report_done(on_done)
                time.sleep(_POLL_S)
        finally:
            _end(process)
        self._report_done(on_done)
        reader.join(_END_S)  # a rank that is still dying may hold the other end
        return process.returncode, "".join(lines)

    def _report_done(self, on_done: Callable[[int], None]) -> None:
        for index in range(len(self._jobs)):
            if index in self._done:
                continue
            witness = read_witness(self._witness_dir, index)
            if witness is not None and witness.code == 0:
                self._done.add(index)
                on_done(index)

    def _failure(self, code: int, output: str) -> PipelineError:
        """Who ended the job: by what it left, by its last words, by mpirun's words, or unknown."""
        index = first_failure(self._witness_dir, len(self._jobs))
        if index is not None:
            witness = read_witness(self._witness_dir, index)
            assert witness is not None
            assert witness.code
            return failure(self._jobs[index], witness.code, witness.host)
        for line in output.splitlines():
            _, marker, words = line.partition(LAST_WORDS)
            if marker:
                return error_from_json(json.loads(words))
        named = self._named_by_mpirun(output)
        if named is not None:
            return named
        refused = refusal(output, len(self._jobs), self._hostfile)
        if refused is not None:
            return StageError(refused)
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        ranks = ", ".join(
            str(job.rank) for index, job in enumerate(self._jobs) if index not in self._done
        )
        what = f"{ended}; unfinished ranks: {ranks or 'none'}\n{last_lines(output)}"
        return StageError(Problem("mpirun", what.rstrip()))

    def _named_by_mpirun(self, output: str) -> PipelineError | None:
        death = reported_death(output)
        if death is None:
            return None
        for index, job in enumerate(self._jobs):
            witness = read_witness(self._witness_dir, index)
            is_it = index == death.rank
            if witness is not None and death.pid is not None:
                is_it = witness.pid == death.pid
            if is_it:
                return failure(job, death.code, "" if witness is None else witness.host)
        return None


def _read(stream: IO[str], lines: deque[str]) -> None:
    lines.extend(stream)


def _end(process: subprocess.Popen[str]) -> None:
    """SIGTERM lets mpirun end its ranks, also on other hosts."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
