"""Backend `onnxruntime`: the network runs on the CPU of whatever host loads it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.backend import BuildFacts
from pipeline.engine.peak_memory import AnonymousPeak, peak_rss_bytes
from pipeline.engine.request import WorkerRequest
from pipeline.errors import GateError, Problem
from pipeline.network import BuildLimits, cpu_graph_path, export_network, weights_path
from pipeline.progress import Progress
from pipeline.targets import Target


class OnnxRuntimeBackend:
    """Export, load, and one real forward pass."""

    name = "onnxruntime"

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """Always: nothing is compiled for the target, the host executes the network."""
        return None

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """Never: the limits are sizes of the cache here, nothing is compiled for them."""
        return None

    def head_size_problem(self, head_size: int) -> Problem | None:
        """Never: any size is computed."""
        return None

    def build_rank(self, request: WorkerRequest, progress: Progress) -> BuildFacts:
        """See EngineBackend. There is no compiler, so no log of one is written."""
        import onnxruntime

        started = time.monotonic()
        engine_dir, rank = request.engine_dir, request.rank
        with AnonymousPeak() as memory:
            export_network(request.checkpoint_dir, rank, engine_dir, request.limits, progress)
            progress.say("loading the network and running it once")
            check_forward(engine_dir, rank)
        weight_bytes = weights_path(engine_dir, rank).stat().st_size
        return BuildFacts(
            backend=self.name,
            rank=rank,
            engine_bytes=weight_bytes + cpu_graph_path(engine_dir, rank).stat().st_size,
            weight_bytes=weight_bytes,
            compiler=f"onnxruntime {onnxruntime.__version__}",
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
            peak_anonymous_bytes=memory.nbytes,
        )


def check_forward(engine_dir: Path, rank: int) -> None:
    """Run a prefill and a decode step of one row through the CPU graph, a segment at a time.

    With several ranks, this one runs alone: what a stage before would send is random, and sums lack the
    others' terms. That shows that every segment loads and computes numbers.

    Raises:
        GateError: a segment does not load, or a result is not a finite number.
    """
    import numpy as np

    from pipeline.engine.collectives import Alone
    from pipeline.engine.segments import RankGraph
    from pipeline.engine.sharded import ShardedNetwork
    from pipeline.parallel import Mapping

    graph = RankGraph(engine_dir, rank)
    facts = graph.facts
    alone = Alone(Mapping(facts.tp, facts.pp, rank, facts.moe_ep))
    num_tokens = min(4, graph.limits.max_seq_len)
    ids_1T = np.linspace(0, facts.vocab_size - 1, num_tokens).astype(np.int64)[None]
    results = [*ShardedNetwork(engine_dir, alone).logits(ids_1T, max(1, num_tokens - 1))]
    numbers = np.concatenate([alone.sent, *(part.ravel() for part in results if part is not None)])
    num_bad = int((~np.isfinite(numbers)).sum())
    if num_bad:
        kind = "logits" if graph.has_head else "hidden states"
        path = str(cpu_graph_path(engine_dir, rank))
        what = f"{num_bad} of {numbers.size} {kind} are not finite"
        raise GateError(Problem(path, what, fix="check the checkpoint's weights and scales"))
