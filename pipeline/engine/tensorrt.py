"""Backend `tensorrt`: TensorRT's own builder, on a machine with the GPU that the engine is for.

Not executed: no machine with a GPU was at hand. Every call is compared with the bindings' own list of
names by tests/unit/test_tensorrt_calls.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipeline.engine.backend import BuildFacts
from pipeline.engine.peak_memory import AnonymousPeak, peak_rss_bytes
from pipeline.engine.request import WorkerRequest
from pipeline.engine.tensorrt_rtx import TensorRtRtxBackend, engine_path
from pipeline.errors import PlanError, Problem
from pipeline.network import BuildLimits
from pipeline.progress import Progress
from pipeline.quant.backends import TENSORRT, formats_for, refusal
from pipeline.quant.formats import MIXABLE
from pipeline.targets import TARGETS, Target


class TensorRtBackend:
    """The same graph and lowering as tensorrt_rtx; kernels are chosen by timing them on the GPU."""

    name = TENSORRT

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """None, or which of the formats TensorRT does not run there."""
        for name in formats:
            refused = refusal(name, self.name, target.sm)
            if refused is not None:
                able = [known.name for known in TARGETS.values() if _runs(known.sm, formats)]
                what = f"{name} for {target.name} (SM{target.sm}): {refused.reason}"
                others = ", ".join(formats_for(self.name, target.sm, MIXABLE))
                fix = f"quantize.format {others}, or build.backend: onnxruntime"
                return Problem("target", what, allowed=", ".join(able), fix=fix)
        return None

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """See EngineBackend; as for TensorRT-RTX, which shares its attention kernels."""
        return TensorRtRtxBackend().limits_problem(limits)

    def head_size_problem(self, head_size: int) -> Problem | None:
        """See EngineBackend; as for TensorRT-RTX."""
        return TensorRtRtxBackend().head_size_problem(head_size)

    def build_rank(self, request: WorkerRequest, progress: Progress) -> BuildFacts:
        """See EngineBackend."""
        from pipeline.engine.tensorrt_build import bindings, build_plan
        from pipeline.network.export import (
            export_network,
            read_checkpoint_spec,
            tensorrt_graph_path,
            weights_path,
        )

        started = time.monotonic()
        rank, limits, target = request.rank, request.limits, TARGETS[request.target]
        spec = read_checkpoint_spec(request.checkpoint_dir, rank, limits)
        problem = (
            self.can_target(target, [part.name for part in spec.format.parts])
            or self.limits_problem(limits)
            or self.head_size_problem(spec.head_size)
        )
        if problem is not None:
            raise PlanError(problem)
        trt = bindings()
        path = engine_path(request.engine_dir, rank)
        cache = f"tensorrt-{trt.__version__}-sm{target.sm}.timing"
        with AnonymousPeak() as memory:
            export_network(request.checkpoint_dir, rank, request.engine_dir, limits, progress)
            progress.say(f"timing kernels and compiling on this machine's GPU, SM{target.sm}")
            activation_bytes = build_plan(
                trt,
                tensorrt_graph_path(request.engine_dir, rank),
                path,
                spec,
                limits,
                request.plan_options,
                request.cache_dir / cache if request.cache_dir else None,
                request.log_path,
            )
        return BuildFacts(
            backend=self.name,
            rank=rank,
            engine_bytes=path.stat().st_size,
            weight_bytes=weights_path(request.engine_dir, rank).stat().st_size,
            activation_bytes=activation_bytes,
            sms=(target.sm,),
            compiler=f"tensorrt {trt.__version__}",
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
            peak_anonymous_bytes=memory.nbytes,
        )


def _runs(sm: int, formats: Sequence[str]) -> bool:
    return all(refusal(name, TENSORRT, sm) is None for name in formats)
