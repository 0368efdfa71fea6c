"""Backend `tensorrt_rtx`: compiles engines for GeForce and workstation GPUs on a host without a GPU."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.engine.backend import BuildFacts, peak_rss_bytes
from pipeline.errors import PlanError, Problem
from pipeline.network import BuildLimits, export_network
from pipeline.progress import Progress
from pipeline.targets import TARGETS, Target

# What set_compute_capability of TensorRT-RTX 1.7 accepts.
SUPPORTED_SMS = (75, 80, 86, 89, 120, 121)
# Turing has no int4 weight kernels: "model contains HW-specific datatypes: int4".
MIN_INT4_SM = 80
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

    name = "tensorrt_rtx"

    def can_target(self, target: Target, quant_algo: str | None = None) -> Problem | None:
        """None, or the reason with the targets that work and the backend for this one."""
        is_int4 = quant_algo in ("W4A16_AWQ", "W4A16_GPTQ")
        lowest = MIN_INT4_SM if is_int4 else min(SUPPORTED_SMS)
        if target.sm in SUPPORTED_SMS and target.sm >= lowest:
            return None
        able = [known.name for known in TARGETS.values() if _can(known.sm, lowest)]
        if target.sm in SUPPORTED_SMS:
            what = f"{target.name} (SM{target.sm}) has no int4 weight kernels in TensorRT-RTX"
            fix = "quantize.format: fp16"
        else:
            other = _OTHER_BACKENDS.get(target.sm, "tensorrt_llm, or tensorrt, on that GPU")
            what = f"TensorRT-RTX 1.7 cannot compile for {target.name} (SM{target.sm})"
            fix = (
                f"the backend for it is {other}; this version of the program does not drive it yet"
                " (backend: onnxruntime builds for the CPU)"
            )
        return Problem("target", what, allowed=", ".join(able), fix=fix)

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

    def build_rank(
        self,
        engine_dir: Path,
        checkpoint_dir: Path,
        rank: int,
        target: Target,
        limits: BuildLimits,
        log_path: Path,
        progress: Progress,
    ) -> BuildFacts:
        """See EngineBackend."""
        from pipeline.checkpoint.reader import CheckpointReader
        from pipeline.engine.rtx_build import build_plan, compiler_version
        from pipeline.engine.rtx_expected import expected_forms
        from pipeline.engine.rtx_layers import check_layers
        from pipeline.engine.rtx_plan import check_header
        from pipeline.engine.rtx_weights import prove_weights
        from pipeline.network.export import read_checkpoint_spec, tensorrt_graph_path

        started = time.monotonic()
        spec = read_checkpoint_spec(checkpoint_dir, limits)
        problem = (
            self.can_target(target, spec.quant_algo)
            or self.limits_problem(limits)
            or self.head_size_problem(spec.head_size)
        )
        if problem is not None:
            raise PlanError(problem)
        version = compiler_version()
        export_network(checkpoint_dir, rank, engine_dir, limits, progress)
        path = engine_path(engine_dir, rank)
        progress.say(f"compiling for SM{target.sm}")
        report = build_plan(
            tensorrt_graph_path(engine_dir, rank), path, spec, limits, target.sm, log_path
        )
        progress.say("checking the plan")
        layers = check_layers(report.listing, spec, str(log_path))
        plan = check_header(path, version, target.sm)
        reader = CheckpointReader(checkpoint_dir / f"rank{rank}.safetensors")
        forms = expected_forms(reader, spec, limits.max_seq_len)
        proof = prove_weights(path, plan.weights, forms)
        return BuildFacts(
            backend=self.name,
            rank=rank,
            engine_bytes=plan.file_bytes,
            weight_bytes=plan.weights.nbytes,
            activation_bytes=report.activation_bytes,
            num_fused_int4=layers.num_fused_int4,
            num_unfused_int4=layers.num_unfused_int4,
            num_fused_attention=layers.num_fused_attention,
            num_proven_tensors=proof.num_tensors,
            proven_bytes=proof.num_bytes,
            compiler=f"tensorrt_rtx {version}",
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _can(sm: int, lowest: int) -> bool:
    return sm in SUPPORTED_SMS and sm >= lowest
