"""Backend `onnxruntime`: the network runs on the CPU of whatever host loads it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.backend import BuildFacts, peak_rss_bytes
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
        )


def check_forward(engine_dir: Path, rank: int) -> None:
    """Load the CPU graph and run a prefill and a decode step of one row.

    Raises:
        GateError: it does not load, or a logit is not a finite number.
    """
    import numpy as np

    from pipeline.engine.onnxruntime import OnnxNetwork

    network = OnnxNetwork(engine_dir, rank)
    shape = network.shape
    num_tokens = min(4, shape.max_seq_len)
    cache = network.new_cache(1)
    ids = np.linspace(0, shape.vocab_size - 1, num_tokens).astype(np.int64)
    for start, stop in ((0, num_tokens - 1), (num_tokens - 1, num_tokens)):
        if start == stop:
            continue
        logits = network.run(
            ids[None, start:stop],
            np.arange(start, stop)[None],
            np.array([start]),
            np.array([stop]),
            np.array([[stop - start - 1]]),
            cache,
        )
        if not np.isfinite(logits).all():
            path = str(cpu_graph_path(engine_dir, rank))
            what = f"{int((~np.isfinite(logits)).sum())} of {logits.size} logits are not finite"
            fix = "check the checkpoint's weights and scales"
            raise GateError(Problem(path, what, fix=fix))
