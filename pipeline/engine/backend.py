"""What a backend is, and what it tells about an engine it built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pipeline.engine.request import WorkerRequest
from pipeline.errors import Problem
from pipeline.network.limits import BuildLimits
from pipeline.progress import Progress
from pipeline.targets import Target


@dataclass(frozen=True)
class BuildFacts:
    """Facts about one rank's engine, measured while it was built and checked.

    Attributes:
        compiler: name and exact version of the compiler, or of the runtime that loaded the graph,
            with one space between.
        engine_bytes: what must be shipped to run it: the TensorRT plan, or the CPU graph and weights.
        weight_bytes: of these, weights (in a plan: its weight chunk).
        seconds: wall time of export, build and checks together.
        peak_rss_bytes: largest resident memory of the build process, file pages included.
        peak_anonymous_bytes: the same without file pages, see engine.peak_memory.AnonymousPeak.
        activation_bytes: device memory for activations at the largest allowed shapes, as the
            compiler reports it. This and all that follow: None where the backend does not say.
        num_fused_quantized: products with int4, int8 or fp8 weights that go into the kernel as they are.
        num_unfused_quantized: those that dequantize the whole weight first (slower, same values).
        num_fused_attention: attention layers that became one kernel; 0 where the model caps attention
            scores, because TensorRT has no such kernel.
        num_all_reduces: sums over the tensor-parallel ranks that became one collective each.
        num_proven_tensors: checkpoint tensors found byte for byte in the engine.
        proven_bytes: their size in the engine.
        sms: compute capabilities times ten that the engine runs on, as its header says where it has one
            that is known; () where nothing is compiled for a GPU.
        weights_sha256: of the weights inside a plan whose other bytes differ from build to build.
    """

    backend: str
    rank: int
    compiler: str
    engine_bytes: int
    weight_bytes: int
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int | None = None
    activation_bytes: int | None = None
    num_fused_quantized: int | None = None
    num_unfused_quantized: int | None = None
    num_fused_attention: int | None = None
    num_all_reduces: int | None = None
    num_proven_tensors: int | None = None
    proven_bytes: int | None = None
    sms: tuple[int, ...] = ()
    weights_sha256: str | None = None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BuildFacts:
        """The inverse of to_json."""
        fields = json.loads(text)
        return cls(**{**fields, "sms": tuple(fields.get("sms", ()))})


class EngineBackend(Protocol):
    """Knows what it can build. Stateless; importing one must not import its compiler."""

    @property
    def name(self) -> str:
        """The word in the YAML."""

    def can_target(self, target: Target, formats: Sequence[str] = ()) -> Problem | None:
        """None if engines for `target` can be built here, else why not and which backend could.

        Args:
            target: a GPU of pipeline.targets.
            formats: of the linears, names of FORMATS.
        """

    def limits_problem(self, limits: BuildLimits) -> Problem | None:
        """None, or why this backend makes no good engine of these limits."""

    def head_size_problem(self, head_size: int) -> Problem | None:
        """None, or why this backend has no attention for heads of `head_size` channels."""


class RankBackend(EngineBackend, Protocol):
    """A backend that builds each rank in a process of its own, from the ONNX network."""

    def build_rank(self, request: WorkerRequest, progress: Progress) -> BuildFacts:
        """Export the network of one rank, build, and check what came out.

        At most one build per process, because TensorRT-RTX keeps the first logger of a process;
        pipeline.engine.worker is that process.

        Raises:
            CheckpointError: the checkpoint is not one the network implements.
            ToolError: the compiler is not installed.
            PlanError: the target cannot be built for.
            StageError: the compiler refused or said something unexpected.
            GateError: what was built is not what was asked for.
        """


def facts_path(engine_dir: Path, rank: int) -> Path:
    """Where the worker leaves the BuildFacts of a rank."""
    return engine_dir / f"rank{rank}.facts.json"


def error_path(engine_dir: Path, rank: int) -> Path:
    """Where the worker leaves the user's error that stopped it."""
    return engine_dir / f"rank{rank}.error.json"
