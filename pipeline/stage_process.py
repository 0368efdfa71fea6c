"""Runs one stage in a process group of its own, follows its progress, and brings back its result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pipeline.config import LoadedConfig
from pipeline.dead_process import death_problem
from pipeline.errors import StageError, error_from_json
from pipeline.progress import Progress
from pipeline.stages.worker import Job
from pipeline.store import LOG

# Thread counts change the last bits of sums. They must not come from whatever shell a run starts in.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)
_END_S = 5.0
_POLL_S = 0.02


def run_stage(
    stage: str,
    loaded: LoadedConfig,
    inputs: Mapping[str, Path],
    out_dir: Path,
    progress: Progress,
    work_dir: Path | None = None,
) -> dict[str, Any]:
    """Run a stage to its end; returns the facts that it reports.

    Args:
        out_dir: becomes the artifact.
        work_dir: of a resumable stage: outlives a run that fails or is killed.

    Raises:
        PipelineError: the stage's own error.
        StageError: its process ended without a word: a bug, or a kill.
    """
    read_fd, write_fd = os.pipe()
    log_path = out_dir / LOG
    job = Job(
        stage=stage,
        loaded=loaded,
        inputs=dict(inputs),
        out_dir=out_dir,
        log_path=log_path,
        report_fd=write_fd,
        parent_pid=os.getpid(),
        work_dir=work_dir,
    )
    with log_path.open("wb") as log, os.fdopen(read_fd) as pipe:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.stages.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write_fd,),
            text=True,
            env=_environment(),
            # Ctrl-C reaches the run alone, which then ends the whole group, compilers included.
            start_new_session=True,
        )
        os.close(write_fd)
        with _ended_as_a_group(child):
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; `death_problem` says how
                child.stdin.write(job.model_dump_json())
                child.stdin.close()
            result = _follow(pipe, progress)
            code = child.wait()
    if result is None or (code != 0 and result["event"] == "done"):
        raise StageError(death_problem(f"stage {stage}", code, log_path))
    if result["event"] == "error":
        raise error_from_json(result)
    facts: dict[str, Any] = result["facts"]
    return facts


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    # Threads that spin while they wait cost a factor of ten on a busy machine.
    return {**kept, "OMP_WAIT_POLICY": "passive"}


@contextlib.contextmanager
def _ended_as_a_group(child: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        try:
            _ask_to_end(child)
        finally:  # also when Ctrl-C comes again
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _ask_to_end(child: subprocess.Popen[str]) -> None:
    """SIGTERM to the group, and a few seconds; nothing where all have ended, as they usually have.

    mpirun passes it on to other hosts, a container's client into the container. SIGKILL would not.
    """
    deadline = time.monotonic() + _END_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()  # until it is waited for, it is one of the group
            os.killpg(child.pid, 0)
            time.sleep(_POLL_S)


def _follow(pipe: TextIO, progress: Progress) -> dict[str, Any] | None:
    """Pass progress on until the pipe closes; the last message if it is a result."""
    handlers: dict[str, Callable[[dict[str, Any]], None]] = {
        "start": lambda message: progress.start(message["total"], message["unit"]),
        "advance": lambda message: progress.advance(message["note"]),
        "say": lambda message: progress.say(message["text"]),
        "status": lambda message: progress.status(message["text"]),
    }
    result = None
    for line in pipe:
        message: dict[str, Any] = json.loads(line)
        handler = handlers.get(message["event"])
        if handler is None:
            result = message
        else:
            handler(message)
    return result
