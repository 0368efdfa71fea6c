"""Entry of the child process that runs one stage: `python -m pipeline.stages.worker`.

A stage has a process of its own so that its memory is given back, the chatter of its libraries lands in
its log, and a kill (out of memory) ends the stage, not the run. The job comes as JSON on standard input;
progress and the result go as JSON lines to the file descriptor that the job names.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel

from pipeline.config import LoadedConfig
from pipeline.disk import disk_error
from pipeline.errors import PipelineError, error_to_json
from pipeline.orphans import die_with_parent
from pipeline.stages import STAGES
from pipeline.stages.stage import StageContext


class Job(BaseModel):
    """What the parent asks for."""

    stage: str
    loaded: LoadedConfig
    inputs: dict[str, Path]
    out_dir: Path
    log_path: Path
    report_fd: int
    parent_pid: int
    work_dir: Path | None = None


class _PipeProgress:
    """Progress as JSON lines to the parent, and as plain lines into the log."""

    def __init__(self, pipe: TextIO) -> None:
        self._pipe = pipe

    def send(self, **message: Any) -> None:
        self._pipe.write(json.dumps(message) + "\n")
        self._pipe.flush()

    def start(self, total: int, unit: str) -> None:
        self.send(event="start", total=total, unit=unit)

    def advance(self, note: str = "") -> None:
        self.send(event="advance", note=note)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.send(event="say", text=text)

    def status(self, text: str) -> None:
        self.send(event="status", text=text)


def main() -> int:
    """Run one stage; the exit code only says whether a result was sent."""
    job = Job.model_validate_json(sys.stdin.read())
    die_with_parent(job.parent_pid)
    with os.fdopen(job.report_fd, "w") as pipe:
        progress = _PipeProgress(pipe)
        context = StageContext(
            job.loaded, job.inputs, job.out_dir, job.log_path, progress, job.work_dir
        )
        try:
            facts = STAGES[job.stage].run(context)
        except PipelineError as error:
            return _fail(progress, error)
        except OSError as error:
            known = disk_error(error)
            if known is None:
                raise
            return _fail(progress, known)
        progress.send(event="done", facts=facts)
    return 0


def _fail(progress: _PipeProgress, error: PipelineError) -> int:
    progress.send(event="error", **error_to_json(error))  # first: the log's disk may be full
    traceback.print_exc()
    return 1


if __name__ == "__main__":
    sys.exit(main())
