"""Converts ranks in several processes, as many at once as cores and free memory carry.

Every process has ranks of its own and writes their files alone. Whole pipeline stages go to one process
each as long as there are no more processes than stages, because stages share no tensor but a tied
embedding. More processes take a block of a stage's ranks each. They read what their ranks hold: rows of
column-parallel weights that no other block needs, and all of the row-parallel ones, which come from the
page cache for all but the first, as blocks of a stage go through the files side by side.

Each runs `python -m pipeline.checkpoint.convert_processes JOB`, by itself or under mpirun.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.build_config import LaunchMode
from pipeline.checkpoint.convert import (
    DEFAULT,
    checked_source,
    convert_checked,
    convert_ranks,
    judge,
    num_targets,
    open_source,
    write_config,
)
from pipeline.checkpoint.describe import ranges
from pipeline.checkpoint.findings import Findings, findings_from_json, merged
from pipeline.checkpoint.importers.awq import METHOD as AWQ
from pipeline.checkpoint.importers.gptq import METHOD as GPTQ
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.errors import PipelineError, error_to_json
from pipeline.launch import (
    ProgressFiles,
    RankJob,
    RankProgress,
    processes_that_fit,
    run_at_once,
    run_ranks,
)
from pipeline.launch.progress import Event
from pipeline.orphans import die_with_parent
from pipeline.parallel import Mapping, mappings
from pipeline.progress import Progress

MEMORY_PER_PROCESS = 256 << 20
"""Three times what was seen at any size (benchmarks/convert.py); page cache is not counted. Linears of
AutoAWQ and GPTQ come on top: they are held whole."""

BYTES_PER_PROCESS = 1 << 30
"""Starting a process takes about as long as converting this much of the source."""


@dataclass(frozen=True)
class _Share:
    """What one process converts; it leaves what it found in `result_path`, or what stopped it in
    `error_path`.

    Attributes:
        options: fields of ConvertOptions.
        progress_path: gets a line for each tensor that is done; every process has its own.
        parent_pid: who waits for it, when that is not MPI; 0: whoever started the process.
    """

    source_dir: str
    out_dir: str
    ranks: tuple[int, ...]
    tp: int
    pp: int
    moe_ep: int
    options: dict[str, bool]
    result_path: str
    error_path: str
    progress_path: str
    parent_pid: int

    @property
    def mappings(self) -> list[Mapping]:
        """Of its ranks."""
        return [mappings(self.tp, self.pp, self.moe_ep)[rank] for rank in self.ranks]


def convert_in_processes(
    source_dir: Path,
    out_dir: Path,
    *,
    tp: int,
    pp: int,
    moe_ep: int = 1,
    launch: LaunchMode,
    progress: Progress,
    hostfile: Path | None = None,
    options: ConvertOptions = DEFAULT,
) -> None:
    """As `convert_checkpoint`, with the same bytes; ranks at the same time where it is faster.

    Args:
        launch: "mpirun" starts the processes under MPI; "sequential" without it.
        hostfile: hosts for mpirun; None: this one, or those of the Slurm allocation.

    Raises:
        CheckpointError, PlanError, StageError: as `convert_checkpoint`; also when a process dies.
        ToolError: mpirun is missing.
    """
    checkpoint = checked_source(source_dir, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, options=options)
    blocks = blocks_of_ranks(tp, pp, _num_processes(checkpoint, tp * pp))
    if len(blocks) == 1:
        progress.start(num_targets(checkpoint, mappings(tp, pp, moe_ep)), "tensors")
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
                ranks=ranks,
                tp=tp,
                pp=pp,
                moe_ep=moe_ep,
                options=asdict(options),
                result_path=f"{scratch}/{index}.json",
                error_path=f"{scratch}/{index}.error",
                progress_path=f"{scratch}/{index}.done",
                parent_pid=0 if launch == "mpirun" else os.getpid(),
            )
            for index, ranks in enumerate(blocks)
        ]
        progress.start(sum(num_targets(checkpoint, share.mappings) for share in shares), "tensors")
        _run(shares, launch, hostfile, Path(scratch), progress)
        judge(_findings(shares), progress, options)
    write_config(checkpoint, out_dir, tp=tp, pp=pp, moe_ep=moe_ep)


def blocks_of_ranks(tp: int, pp: int, at_most: int) -> list[tuple[int, ...]]:
    """The ranks of each process: whole stages, or equally many blocks of every stage."""
    if at_most < 2 * pp:
        count = min(at_most, pp)
        return [
            tuple(rank for stage in range(index, pp, count) for rank in _ranks(tp, stage))
            for index in range(count)
        ]
    count = min(at_most // pp, tp)
    edges = [tp * index // count for index in range(count + 1)]
    return [
        tuple(_ranks(tp, stage)[low:high])
        for stage in range(pp)
        for low, high in itertools.pairwise(edges)
    ]


def _ranks(tp: int, stage: int) -> range:
    return range(stage * tp, (stage + 1) * tp)


def _num_processes(checkpoint: HfCheckpoint, world_size: int) -> int:
    tensors = checkpoint.reader.tensors.values()
    worthwhile = min(world_size, 1 + sum(tensor.nbytes for tensor in tensors) // BYTES_PER_PROCESS)
    held = 0
    if checkpoint.method in (AWQ, GPTQ):
        held = 2 * max(tensor.nbytes for tensor in tensors)
    return processes_that_fit(MEMORY_PER_PROCESS + held, at_most=worthwhile)


def _run(
    shares: Sequence[_Share],
    launch: LaunchMode,
    hostfile: Path | None,
    scratch: Path,
    progress: Progress,
) -> None:
    """Every share in a process of its own, named by its ranks."""
    jobs = [
        RankJob(
            rank=share.ranks[0],
            module=__name__,
            argument=json.dumps(asdict(share)),
            log_path=f"{scratch}/{index}.log",
            error_path=share.error_path,
            name=_name(share.ranks),
            own_process=True,
            inputs=(share.source_dir, share.out_dir),
        )
        for index, share in enumerate(shares)
    ]

    def on_event(index: int, event: Event) -> None:
        if event["event"] == "advance":  # the total is known already
            progress.advance()

    files = ProgressFiles([Path(share.progress_path) for share in shares], on_event)
    if launch == "mpirun":
        jobs_path = scratch / "jobs.json"
        run_ranks(jobs, launch, jobs_path, hostfile=hostfile, on_tick=files.poll)
    else:
        run_at_once(jobs, files.poll)
    files.finish()


def _name(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"


def _findings(shares: Sequence[_Share]) -> Findings:
    """What the processes found, added up."""
    texts = (Path(share.result_path).read_text("utf-8") for share in shares)
    return merged(findings_from_json(json.loads(text)) for text in texts)


def main(argument: str) -> int:
    """Convert one share; the exit code is that of the first thing that went wrong, or 0."""
    share = _Share(**json.loads(argument))
    die_with_parent(share.parent_pid or os.getppid())
    progress = RankProgress(Path(share.progress_path))
    options = ConvertOptions(**share.options)
    try:
        checkpoint = open_source(Path(share.source_dir), tp=share.tp, options=options)
        findings = convert_ranks(checkpoint, Path(share.out_dir), share.mappings, progress=progress)
    except PipelineError as error:
        Path(share.error_path).write_text(json.dumps(error_to_json(error)), "utf-8")
        return int(error.exit_code)
    Path(share.result_path).write_text(json.dumps(findings.to_json()), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
