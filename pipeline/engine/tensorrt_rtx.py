"""Backend `tensorrt_rtx`: compiles engines for GeForce and workstation GPUs on a host without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engine.backend import BuildFacts
from pipeline.engine.peak_memory import AnonymousPeak, peak_rss_bytes
from pipeline.engine.request import WorkerRequest
from pipeline.errors import PlanError, Problem
from pipeline.network import BuildLimits, export_network
from pipeline.progress import Progress
from pipeline.quant.backends import TENSORRT_RTX, formats_for, refusal
from pipeline.quant.formats import MIXABLE
from pipeline.targets import TARGETS, Target

if TYPE_CHECKING:
    from pipeline.engine.rtx_layers import LayerCounts
    from pipeline.engine.rtx_plan import PlanHeader
    from pipeline.engine.rtx_weights import WeightProof
    from pipeline.network.spec import NetworkSpec

MIN_INPUT_LEN = 2
ALSO_FOR = "build.also_for"
HEAD_SIZES = range(16, 257, 8)
# Where a GPU that TensorRT-RTX refuses gets its engine from.
_OTHER_BACKENDS = {
    87: "tensorrt, on the module itself",
    90: "tensorrt_llm or tensorrt, on that GPU",
    100: "tensorrt_llm or tensorrt, on that GPU",
    103: "tensorrt_llm or tensorrt, on that GPU",
    110: "tensorrt, on the module itself",
}


def engine_path(engine_dir: Path, rank: int) -> Path:
    """The TensorRT plan of a rank."""
    return engine_dir / f"rank{rank}.engine"


@dataclass(frozen=True)
class _Built:
    """What the checks of a plan found."""

    plan: PlanHeader
    layers: LayerCounts
    proof: WeightProof
    activation_bytes: int | None
    weights_sha256: str


class TensorRtRtxBackend:
    """Parse the float16 graph, lower it, compile it ahead of time, and prove the plan."""

    name = TENSORRT_RTX

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """None, or the reason with the targets that work and what works on this one."""
        able = [known.name for known in TARGETS.values() if _runs(known.sm, formats)]
        if not _runs(target.sm, ()):
            other = _OTHER_BACKENDS.get(target.sm, "tensorrt_llm or tensorrt, on that GPU")
            what = f"TensorRT-RTX 1.7 cannot compile for {target.name} (SM{target.sm})"
            fix = (
                f"build.backend: {other} (elsewhere the run ends with a kit to build it there), or "
                "onnxruntime for the CPU"
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
        started = time.monotonic()
        with AnonymousPeak() as memory:
            built = self._built(request, progress)
        return BuildFacts(
            backend=self.name,
            rank=request.rank,
            compiler=f"tensorrt_rtx {built.plan.version}",
            engine_bytes=built.plan.file_bytes,
            weight_bytes=built.plan.weights.nbytes,
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss_bytes(),
            peak_anonymous_bytes=memory.nbytes,
            activation_bytes=built.activation_bytes,
            sms=built.plan.sms,
            num_fused_quantized=built.layers.num_fused_quantized,
            num_unfused_quantized=built.layers.num_unfused_quantized,
            num_fused_attention=built.layers.num_fused_attention,
            num_all_reduces=built.layers.num_all_reduces,
            num_proven_tensors=built.proof.num_tensors,
            proven_bytes=built.proof.num_bytes,
            weights_sha256=built.weights_sha256,
        )

    def _built(self, request: WorkerRequest, progress: Progress) -> _Built:
        """Export, compile and check."""
        from pipeline.engine.rtx_build import build_plan, compiler_version, profile_shapes
        from pipeline.engine.rtx_io import check_io
        from pipeline.engine.rtx_layers import check_layers
        from pipeline.engine.rtx_plan import check_header, chunk_sha256, sm_names
        from pipeline.network.export import read_checkpoint_spec, tensorrt_graph_path

        rank, limits = request.rank, request.limits
        spec = read_checkpoint_spec(request.checkpoint_dir, rank, limits)
        sms = self._checked_sms(request, spec)
        version = compiler_version()
        export_network(request.checkpoint_dir, rank, request.engine_dir, limits, progress)
        path = engine_path(request.engine_dir, rank)
        graph_path = tensorrt_graph_path(request.engine_dir, rank)
        progress.say(f"compiling for {sm_names(sms)}")
        report = build_plan(graph_path, path, spec, limits, sms, request.log_path)
        progress.say("checking the plan")
        where = str(request.log_path)
        layers = check_layers(report.listing, spec, where)
        check_io(report.listing, graph_path, profile_shapes(spec, limits), where)
        plan = check_header(path, version, sms)
        proof = _proof(request, spec, path, plan)
        digest = chunk_sha256(path, plan.weights)
        return _Built(plan, layers, proof, report.activation_bytes, digest)

    def _checked_sms(self, request: WorkerRequest, spec: NetworkSpec) -> tuple[int, ...]:
        """What to compile for. Raises PlanError: it cannot be compiled for there."""
        formats = [part.name for part in spec.format.parts]
        others = (
            self.limits_problem(request.limits),
            self.head_size_problem(spec.head_size),
        )
        problems = [
            *target_problems(request.target, request.also_for, formats),
            *(problem for problem in others if problem is not None),
        ]
        if problems:
            raise PlanError(problems)
        return plan_sms(request.target, request.also_for)


def target_problems(
    target: str, also_for: Sequence[str], formats: Sequence[str] = ()
) -> list[Problem]:
    """Of each GPU that one plan shall run on, why it cannot be in it; see EngineBackend.can_target.

    Those of `also_for` are problems of ALSO_FOR.
    """
    backend = TensorRtRtxBackend()
    problems = []
    for name in dict.fromkeys((target, *also_for)):
        problem = backend.can_target(TARGETS[name], formats)
        if problem is not None and name != target:
            problem = replace(problem, where=ALSO_FOR)
        if problem is not None:
            problems.append(problem)
    return problems


def plan_sms(target: str, also_for: Sequence[str]) -> tuple[int, ...]:
    """Compute capabilities in the plan, in rising order; GPUs may share one."""
    return tuple(sorted({TARGETS[name].sm for name in (target, *also_for)}))


def _proof(request: WorkerRequest, spec: NetworkSpec, path: Path, plan: PlanHeader) -> WeightProof:
    """Of the rank's weights in the plan."""
    from pipeline.checkpoint.reader import CheckpointReader
    from pipeline.engine.rtx_expected import expected_forms
    from pipeline.engine.rtx_weights import prove_weights

    reader = CheckpointReader(request.checkpoint_dir / f"rank{request.rank}.safetensors")
    forms = expected_forms(reader, spec, request.limits.max_seq_len)
    return prove_weights(path, plan.weights, forms)


def _runs(sm: int, formats: Sequence[str]) -> bool:
    return all(refusal(name, TENSORRT_RTX, sm) is None for name in (*formats, "fp16"))
