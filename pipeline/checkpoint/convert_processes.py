"""Converts pipeline stages in processes of their own, as many at once as cores and memory carry.

Stages share no tensor but a tied embedding, so every process streams its own part of the source. Each
runs `python -m pipeline.checkpoint.convert_processes JOB`, by itself or under mpirun.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import errors
from pipeline.checkpoint.convert import (
    DEFAULT,
    checked_source,
    convert_checked,
    convert_stages,
    num_targets,
    open_source,
    write_config,
)
from pipeline.checkpoint.options import ConvertOptions
from pipeline.config import LaunchMode
from pipeline.errors import CheckpointError, PipelineError, Problem
from pipeline.launch import RankJob, processes_that_fit, run_at_once, run_ranks
from pipeline.orphans import die_with_parent
from pipeline.progress import Progress

MEMORY_PER_PROCESS = 256 << 20
"""Three times what was seen at any size (benchmarks/convert.py); page cache is not counted."""

BYTES_PER_PROCESS = 1 << 30
"""Starting a process takes about as long as converting this much of the source."""

_WATCH_S = 0.5


@dataclass(frozen=True)
class _Share:
    """What one process converts; it leaves its problems in `result_path`.

    Attributes:
        options: fields of ConvertOptions.
        progress_path: gets one byte for each tensor that is done; every process has its own.
        parent_pid: who waits for it, when that is not MPI; 0: whoever started the process.
    """

    source_dir: str
    out_dir: str
    stages: tuple[int, ...]
    tp: int
    pp: int
    options: dict[str, bool]
    moe_ep: int
    result_path: str
    progress_path: str
    parent_pid: int


def convert_in_processes(
    source_dir: Path,
    out_dir: Path,
    *,
    tp: int,
    pp: int,
    moe_ep: int = 1,
    launch: LaunchMode,
    progress: Progress,
    options: ConvertOptions = DEFAULT,
) -> None:
    """As `convert_checkpoint`, with the same bytes; stages at the same time where it is faster.

    Args:
        launch: "mpirun" starts the processes under MPI; "sequential" without it.

    Raises:
        CheckpointError, PlanError, StageError: as `convert_checkpoint`; also when a process dies.
        ToolError: mpirun is missing.
    """
    checkpoint = checked_source(source_dir, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, options=options)
    progress.start(num_targets(checkpoint, pp), "tensors")
    source_bytes = sum(tensor.nbytes for tensor in checkpoint.reader.tensors.values())
    worthwhile = min(pp, 1 + source_bytes // BYTES_PER_PROCESS)
    count = processes_that_fit(MEMORY_PER_PROCESS, at_most=worthwhile)
    if count == 1:
        convert_checked(
            checkpoint, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, progress=progress, options=options
        )
        return
    # Beside the output: a rank on another host of an MPI job shares only this directory.
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out_dir) as scratch:
        shares = [
            _Share(
                str(source_dir.resolve()),
                str(out_dir.resolve()),
                stages=tuple(range(index, pp, count)),
                tp=tp,
                pp=pp,
                moe_ep=moe_ep,
                options=asdict(options),
                result_path=f"{scratch}/{index}.json",
                progress_path=f"{scratch}/{index}.done",
                parent_pid=0 if launch == "mpirun" else os.getpid(),
            )
            for index in range(count)
        ]
        _run(shares, launch, Path(scratch), progress)
        _raise_problems(shares, progress)
    write_config(checkpoint, out_dir, tp=tp, pp=pp, moe_ep=moe_ep)


def _run(shares: Sequence[_Share], launch: LaunchMode, scratch: Path, progress: Progress) -> None:
    """Every share in a process of its own; named by the first rank that it converts."""
    jobs = [
        RankJob(
            rank=share.stages[0] * share.tp,
            module=__name__,
            argument=json.dumps(asdict(share)),
            log_path=f"{scratch}/{index}.log",
            error_path=f"{scratch}/{index}.error",
        )
        for index, share in enumerate(shares)
    ]
    with _watching([Path(share.progress_path) for share in shares], progress):
        if launch == "mpirun":
            run_ranks(jobs, launch, scratch / "jobs.json")
        else:
            run_at_once(jobs)


def _raise_problems(shares: Sequence[_Share], progress: Progress) -> None:
    """What the processes said and found, all at once; a full disk and the like before bad values."""
    found: dict[str, list[Problem]] = {}
    for share in shares:
        result = json.loads(Path(share.result_path).read_text("utf-8"))
        for text in result["said"]:
            progress.say(text)
        found.setdefault(result["kind"], []).extend(
            Problem(**problem) for problem in result["problems"]
        )
    for name, problems in sorted(found.items(), key=lambda item: item[0] == "CheckpointError"):
        if problems:
            kind: type[PipelineError] = getattr(errors, name)
            raise kind(problems)


@contextmanager
def _watching(paths: Sequence[Path], progress: Progress) -> Iterator[None]:
    """Passes the progress of other processes on: one step for each byte of their files."""
    ended = threading.Event()

    def report() -> None:
        done = 0
        while True:
            last = ended.wait(_WATCH_S)
            total = sum(path.stat().st_size for path in paths if path.exists())
            for _ in range(total - done):
                progress.advance()
            done = total
            if last:
                return

    watcher = threading.Thread(target=report, name="convert progress")
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class _FileProgress:
    """One byte for each step; keeps what is said."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self.said: list[str] = []

    def start(self, total: int, unit: str) -> None:
        """The parent knows the total."""

    def advance(self, note: str = "") -> None:
        self._file.write(b".")

    def say(self, text: str) -> None:
        self.said.append(text)


def main(argument: str) -> None:
    """Convert one share. What is wrong goes into its result file; only a bug makes this fail."""
    share = _Share(**json.loads(argument))
    die_with_parent(share.parent_pid or os.getppid())
    progress = _FileProgress(Path(share.progress_path))
    kind = CheckpointError.__name__
    options = ConvertOptions(**share.options)
    try:
        problems = convert_stages(
            open_source(Path(share.source_dir), tp=share.tp, options=options),
            Path(share.out_dir),
            share.stages,
            tp=share.tp,
            pp=share.pp,
            moe_ep=share.moe_ep,
            progress=progress,
            options=options,
        )
    except PipelineError as error:
        kind, problems = type(error).__name__, list(error.problems)
    listed = [vars(problem) for problem in problems]
    result = {"kind": kind, "problems": listed, "said": progress.said}
    Path(share.result_path).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
