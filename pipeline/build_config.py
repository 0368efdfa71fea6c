"""The section `build` of a YAML: which backend, for what sizes, and how its ranks are started."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.calibration_config import Section

BackendName = Literal["onnxruntime", "tensorrt_rtx", "none"]
"""`none` ends with the converted checkpoint, for trtllm-build or another tool."""
LaunchMode = Literal["sequential", "mpirun"]


class BuildConfig(Section):
    """The engine's backend and limits."""

    backend: BackendName = "tensorrt_rtx"
    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    max_input_len: Annotated[int, Field(ge=1, le=1048576)] = 512
    max_seq_len: Annotated[int, Field(ge=2, le=1048576)] = 1024
    launch: LaunchMode = "sequential"

    @model_validator(mode="after")
    def _input_fits(self) -> BuildConfig:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} leaves no room for an answer in max_seq_len "
                f"{self.max_seq_len}; allowed: less than max_seq_len"
            )
        return self
