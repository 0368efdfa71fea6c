"""The section `build` of a YAML: which backend, for what sizes, and how its ranks are started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.calibration_config import Section
from pipeline.targets import TARGETS
from pipeline.tensorrt_llm_config import TensorRtLlmConfig

BackendName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt", "tensorrt_llm", "none"]
"""`none` ends with the converted checkpoint, for another tool."""
NETWORK_BACKENDS: frozenset[BackendName] = frozenset(("onnxruntime", "tensorrt_rtx", "tensorrt"))
"""Those that build from the ONNX network, which the CPU can run."""
LaunchMode = Literal["sequential", "mpirun"]
BYTE_NEUTRAL = frozenset({"launch", "hostfile", "max_memory_gb"})
"""Fields of BuildConfig that change no byte of an engine."""


class TensorRtConfig(Section):
    """Options of backend tensorrt."""

    profiles: Literal["one", "context_and_generation"] = "context_and_generation"
    """One optimization profile for calls of any length, or one for prompts and one for single tokens."""
    strip_plan: bool = False
    """A plan without the weights that refitting puts back."""
    refit: bool = False
    """Weights can be replaced in the finished plan; implied by strip_plan."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    """TensorRT's builder_optimization_level."""
    timing_cache: bool = True
    """Measured kernel times are kept in the store, one file for each TensorRT version and SM."""


class BuildConfig(Section):
    """The engine's backend and limits."""

    backend: BackendName = "tensorrt_rtx"
    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    max_input_len: Annotated[int, Field(ge=1, le=1048576)] = 512
    max_seq_len: Annotated[int, Field(ge=2, le=1048576)] = 1024
    launch: LaunchMode = "sequential"
    hostfile: Annotated[str, Field(min_length=1)] | None = None
    """Hosts that mpirun starts ranks on; relative to the YAML file. None: this one, or those of the
    Slurm allocation."""
    max_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Host memory that ranks may take at the same time, on each host; None: what is free there."""
    also_for: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Further targets that the same tensorrt_rtx plan runs on."""
    tensorrt: TensorRtConfig = TensorRtConfig()
    """Read by backend tensorrt alone."""
    tensorrt_llm: TensorRtLlmConfig = TensorRtLlmConfig()
    """Read by backend tensorrt_llm alone."""

    @field_validator("also_for")
    @classmethod
    def _targets_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in TARGETS]
        if unknown:
            raise ValueError(
                f"unknown target {', '.join(map(repr, unknown))}; allowed: "
                f"{', '.join(sorted(TARGETS))}"
            )
        return names

    @model_validator(mode="after")
    def _hosts_are_for_mpirun(self) -> BuildConfig:
        if self.hostfile is not None and self.launch != "mpirun":
            raise ValueError(f"hostfile with launch {self.launch}; allowed: with launch mpirun")
        return self

    @model_validator(mode="after")
    def _input_fits(self) -> BuildConfig:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} leaves no room for an answer in max_seq_len "
                f"{self.max_seq_len}; allowed: less than max_seq_len"
            )
        return self
