"""Backend `tensorrt_rtx`: compiles engines for GeForce and workstation GPUs on a host without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.backend import BuildFacts, peak_rss_bytes
from pipeline.engine.request import WorkerRequest
from pipeline.errors import PlanError, Problem
from pipeline.network import BuildLimits, export_network
from pipeline.progress import Progress
from pipeline.quant.backends import TENSORRT_RTX, formats_for, refusal
from pipeline.quant.formats import MIXABLE
from pipeline.targets import TARGETS, Target

MIN_INPUT_LEN = 2
HEAD_SIZES = range(16, 257, 8)
# Where a GPU that TensorRT-RTX refuses gets its engine from.
_OTHER_BACKENDS = {
    87: "tensorrt, run on the Jetson module itself",
    90: "tensorrt_llm, or tensorrt, run on a host with that GPU",
    100: "tensorrt_llm, or tensorrt, run on a host with that GPU",
    103: "tensorrt_llm, or tensorrt, run on a host with that GPU",
    110: "tensorrt, run on the Jetson module itself",
}


def engine_path(engine_dir: Path, rank: int) -> Path:
    """The TensorRT plan of a rank."""
    return engine_dir / f"rank{rank}.engine"


class TensorRtRtxBackend:
    """Parse the float16 graph, lower it, compile it ahead of time, and prove the plan."""

    name = TENSORRT_RTX

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """None, or the reason with the targets that work and what works on this one."""
        able = [known.name for known in TARGETS.values() if _runs(known.sm, formats)]
        if not _runs(target.sm, ()):
            other = _OTHER_BACKENDS.get(target.sm, "tensorrt_llm, or tensorrt, on that GPU")
            what = f"TensorRT-RTX 1.7 cannot compile for {target.name} (SM{target.sm})"
            fix = (
                f"the backend for it is {other}; this version of the program does not drive it yet"
                " (backend: onnxruntime builds for the CPU)"
            )
            return Problem("target", what, allowed=", ".join(able), fix=fix)
        for name in formats:
            refused = refusal(name, self.name, target.sm)
            if refused is not None:
                what = f"{name} for {target.name} (SM{target.sm}): {refused.reason}"
                others = formats_for(self.name, target.sm, MIXABLE)
                fix = f"quantize.format {', '.join(others)}, or build.backend: onnxruntime"
                return Problem("target", what, allowed=", ".join(able), fix=fix)
        return None

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """See EngineBackend.

        Where a call can only hold one token per row, TensorRT-RTX 1.7 builds attention from single
        matrix products.
        """
        if limits.max_input_len >= MIN_INPUT_LEN:
            return None
        what = f"max_input_len is {limits.max_input_len}: TensorRT-RTX would not fuse attention"
        return Problem("build limits", what, f"{MIN_INPUT_LEN} or more")

    def head_size_problem(self, head_size: int) -> Problem | None:
        """See EngineBackend. Tried with TensorRT-RTX 1.7.1: 2 to 512."""
        if head_size in HEAD_SIZES:
            return None
        what = f"TensorRT-RTX has no attention kernel for heads of {head_size} channels"
        return Problem("head_size", what, "multiples of 8, 16 to 256", "build.backend: onnxruntime")

    def build_rank(self, request: WorkerRequest, progress: Progress) -> BuildFacts:
        """See EngineBackend."""
        from pipeline.checkpoint.reader import CheckpointReader
        from pipeline.engine.rtx_build import build_plan, compiler_version
        from pipeline.engine.rtx_expected import expected_forms
        from pipeline.engine.rtx_layers import check_layers
        from pipeline.engine.rtx_plan import check_header
        from pipeline.engine.rtx_weights import prove_weights
        from pipeline.network.export import read_checkpoint_spec, tensorrt_graph_path

        started = time.monotonic()
        rank, limits, target = request.rank, request.limits, TARGETS[request.target]
        spec = read_checkpoint_spec(request.checkpoint_dir, limits)
        problem = (
            self.can_target(target, [part.name for part in spec.format.parts])
            or self.limits_problem(limits)
            or self.head_size_problem(spec.head_size)
        )
        if problem is not None:
            raise PlanError(problem)
        version = compiler_version()
        export_network(request.checkpoint_dir, rank, request.engine_dir, limits, progress)
        path = engine_path(request.engine_dir, rank)
        progress.say(f"compiling for SM{target.sm}")
        report = build_plan(
            tensorrt_graph_path(request.engine_dir, rank),
            path,
            spec,
            limits,
            target.sm,
            request.log_path,
        )
        progress.say("checking the plan")
        layers = check_layers(report.listing, spec, str(request.log_path))
        plan = check_header(path, version, target.sm)
        reader = CheckpointReader(request.checkpoint_dir / f"rank{rank}.safetensors")
        forms = expected_forms(reader, spec, limits.max_seq_len)
        proof = prove_weights(path, plan.weights, forms)
        return BuildFacts(
            backend=self.name,
            rank=rank,
            engine_bytes=plan.file_bytes,
            weight_bytes=plan.weights.nbytes,
            activation_bytes=report.activation_bytes,
            num_fused_quantized=layers.num_fused_quantized,
            num_unfused_quantized=layers.num_unfused_quantized,
            num_fused_attention=layers.num_fused_attention,
            num_proven_tensors=proof.num_tensors,
            proven_bytes=proof.num_bytes,
            compiler=f"tensorrt_rtx {version}",
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _runs(sm: int, formats: Sequence[str]) -> bool:
    return all(refusal(name, TENSORRT_RTX, sm) is None for name in (*formats, "fp16"))
