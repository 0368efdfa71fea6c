"""The engine's side of a comparison: in this process, or one process per rank under mpirun.

`python -m pipeline.verification.ranks REQUEST_JSON` is one rank of several. The last stage's tp_rank 0
gathers the logits and compares them; the others only compute.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.collectives import Alone, Collectives, OverMpi
from pipeline.errors import PipelineError, error_to_json
from pipeline.launch import RankJob, RankProgress, run_in_view
from pipeline.orphans import die_with_parent
from pipeline.parallel import Mapping
from pipeline.progress import Progress
from pipeline.verification.logits import EngineLogits, OriginalLogits
from pipeline.verification.measure import Measurement, measure

if TYPE_CHECKING:
    from pipeline.network.rank_facts import RankFacts


@dataclass(frozen=True)
class RankRequest:
    """What every rank of an engine gets.

    Attributes:
        tokens_path: int64 [W, T], saved by numpy.
        hidden_path, returns_tuple: what the original's layers have made of the windows; see
            `LayerOutputs`.
        call_len: tokens of one call.
        num_threads: of each rank; None: its share of the host's cores.
        measurement_path: written by the rank that gathers.
        error_path, progress_path: "{rank}" in them is the rank: an error that it stopped with, and how
            far it is.
    """

    source_dir: Path
    engine_dir: Path
    tokens_path: Path
    hidden_path: Path
    returns_tuple: bool
    call_len: int
    num_threads: int | None
    tp: int
    pp: int
    moe_ep: int
    measurement_path: Path
    error_path: str
    progress_path: str

    def to_json(self) -> str:
        """The one argument of a rank's process."""
        values = asdict(self)
        return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()})

    @classmethod
    def from_json(cls, text: str) -> RankRequest:
        """The inverse of to_json."""
        values = json.loads(text)
        paths = [field.name for field in fields(cls) if field.type == "Path"]
        return cls(**{**values, **{name: Path(values[name]) for name in paths}})


def run_engine(
    request: RankRequest,
    facts: RankFacts,
    work_dir: Path,
    progress: Progress,
    hostfile: Path | None,
) -> Measurement:
    """Run all ranks of an engine and compare what they say with the original.

    Args:
        hostfile: where ranks run; None: here. Other hosts must see the same directories.

    Raises:
        PipelineError: a rank failed; it is named.
        ToolError: mpirun is missing.
    """
    if facts.world_size == 1:
        found = run_rank(request, Alone(Mapping()), request.num_threads, progress)
        assert found is not None
        return found
    progress.start(facts.world_size, "ranks")
    jobs = [_job(request, rank, work_dir) for rank in range(facts.world_size)]
    run_in_view(jobs, "mpirun", work_dir / "jobs.json", progress, hostfile=hostfile)
    return Measurement.load(request.measurement_path)


def _job(request: RankRequest, rank: int, work_dir: Path) -> RankJob:
    return RankJob(
        rank=rank,
        module="pipeline.verification.ranks",
        argument=request.to_json(),
        log_path=str(work_dir / f"rank{rank}.log"),
        error_path=request.error_path.format(rank=rank),
        progress_path=request.progress_path.format(rank=rank),
        inputs=(str(request.engine_dir), str(request.source_dir), str(work_dir)),
    )


def run_rank(
    request: RankRequest, collectives: Collectives, num_threads: int | None, progress: Progress
) -> Measurement | None:
    """One rank's part; the comparison on the rank that gathers, None on the others.

    Raises:
        GateError: files of the rank that cannot be loaded or belong to another one.
        CheckpointError: engine and original do not belong together.
    """
    from pipeline.engine.sharded import ShardedNetwork

    tokens_WT = np.load(request.tokens_path, allow_pickle=False)
    network = ShardedNetwork(request.engine_dir, collectives, num_threads, progress)
    progress.start(network.num_steps(*tokens_WT.shape) + len(tokens_WT), "steps")
    if not network.gathers:
        for _ in network.logits(tokens_WT, request.call_len):
            pass
        return None
    engine = EngineLogits(network)
    original = _original(request, tokens_WT, num_threads)
    return measure(original, engine, tokens_WT, request.call_len, progress)


def _original(
    request: RankRequest, tokens_WT: NDArray[np.int64], num_threads: int | None
) -> OriginalLogits:
    import torch

    from pipeline.quant.data import TokenWindows
    from pipeline.quant.layers.batches import equal_length_batches
    from pipeline.quant.layers.forward import LayerOutputs
    from pipeline.quant.source import open_original

    if num_threads is not None:
        torch.set_num_threads(num_threads)  # the other ranks compute beside its lm_head
    checkpoint = open_original(request.source_dir)
    windows = TokenWindows(tokens_WT, len(tokens_WT), tokens_WT.size)
    outputs = LayerOutputs(
        checkpoint,
        equal_length_batches(windows, 1),
        request.hidden_path,
        torch.float32,
        returns_tuple=request.returns_tuple,
    )
    return OriginalLogits(outputs, checkpoint.shape.vocab_size)


def main(argument: str) -> int:
    """One rank under mpirun; the exit code is that of what went wrong, or 0."""
    die_with_parent(os.getppid())
    request = RankRequest.from_json(argument)
    rank: object = "?"
    try:
        collectives = OverMpi(request.tp, request.pp, request.moe_ep)
        rank = collectives.mapping.rank
        num_threads = request.num_threads or collectives.num_threads
        progress = RankProgress(Path(request.progress_path.format(rank=rank)))
        found = run_rank(request, collectives, num_threads, progress)
    except PipelineError as error:
        print(error, file=sys.stderr, flush=True)
        path = Path(request.error_path.format(rank=rank))
        path.write_text(json.dumps(error_to_json(error)), encoding="utf-8")
        return int(error.exit_code)
    if found is not None:
        found.save(request.measurement_path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
