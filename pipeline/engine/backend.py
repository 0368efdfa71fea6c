"""What a backend is, and what it tells about an engine it built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import Problem
from pipeline.network.limits import BuildLimits
from pipeline.progress import Progress
from pipeline.targets import Target


@dataclass(frozen=True)
class BuildFacts:
    """Facts about one rank's engine, measured while it was built and checked.

    Attributes:
        engine_bytes: what must be shipped to run it: the TensorRT plan, or the CPU graph and weights.
        weight_bytes: of these, weights (in a plan: its weight chunk).
        activation_bytes: device memory for activations at the largest allowed shapes, as the
            compiler reports it; None where the backend does not say.
        num_fused_int4: int4 matrix products whose dequantization is part of the same kernel.
        num_unfused_int4: int4 products that dequantize the whole weight first (slower, same values).
        num_fused_attention: attention layers that became one kernel; None: not looked at. 0 where the
            model caps attention scores, because TensorRT has no such kernel.
        num_proven_tensors: checkpoint tensors found byte for byte in the engine.
        proven_bytes: their size in the engine.
        compiler: name and version of the compiler, or of the runtime that loaded the graph.
        seconds: wall time of export, build and checks together.
        peak_rss_bytes: largest resident memory of the build process, file pages included.
    """

    backend: str
    rank: int
    engine_bytes: int
    weight_bytes: int
    activation_bytes: int | None
    num_fused_int4: int | None
    num_unfused_int4: int | None
    num_fused_attention: int | None
    num_proven_tensors: int | None
    proven_bytes: int | None
    compiler: str
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BuildFacts:
        """The inverse of to_json."""
        return cls(**json.loads(text))


class EngineBackend(Protocol):
    """Builds engines. Stateless; importing one must not import its compiler."""

    @property
    def name(self) -> str:
        """The word in the YAML."""

    def can_target(self, target: Target, quant_algo: str | None = None) -> Problem | None:
        """None if engines for `target` can be built here, else why not and which backend could.

        Args:
            target: a GPU of pipeline.targets.
            quant_algo: as in a TensorRT-LLM checkpoint, e.g. "W4A16_AWQ"; None: unquantized.
        """

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """None, or why this backend makes no good engine of these limits."""

    def head_size_problem(self, head_size: int) -> Problem | None:
        """None, or why this backend has no attention for heads of `head_size` channels."""

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
        """Export the network of `rank` into `engine_dir`, build, and check what came out.

        At most one build per process, because TensorRT-RTX keeps the first logger of a process;
        pipeline.engine.worker is that process.

        Args:
            engine_dir: existing directory without files of this rank.
            checkpoint_dir: TensorRT-LLM checkpoint.
            log_path: where the compiler's own log goes.

        Raises:
            CheckpointError: the checkpoint is not one the network implements.
            ToolError: the compiler is not installed.
            PlanError: `target` cannot be built for.
            StageError: the compiler refused or said something unexpected.
            GateError: what was built is not what was asked for.
        """


def facts_path(engine_dir: Path, rank: int) -> Path:
    """Where the worker leaves the BuildFacts of a rank."""
    return engine_dir / f"rank{rank}.facts.json"


def error_path(engine_dir: Path, rank: int) -> Path:
    """Where the worker leaves the user's error that stopped it."""
    return engine_dir / f"rank{rank}.error.json"


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes.

    From /proc where there is one: getrusage would also count the parent before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
