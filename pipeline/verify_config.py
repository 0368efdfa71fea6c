"""The section `verify` of a YAML: on which text the engine is compared, and what it must keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.calibration_config import BUNDLED, Section, refuse_two_columns


class GatesConfig(Section):
    """Limits that the engine must keep against the original model, or nothing is published."""

    max_perplexity_ratio: Annotated[float, Field(gt=0)] = 1.05
    max_mean_kl: Annotated[float, Field(gt=0)] = 0.05
    min_top1_agreement: Annotated[float, Field(gt=0, le=1)] = 0.85


class VerifyConfig(Section):
    """Held-out text and limits of the comparison."""

    data: str = BUNDLED
    column: Annotated[str, Field(min_length=1)] | None = None
    """As for calibration."""
    messages: Annotated[str, Field(min_length=1)] | None = None
    """As for calibration."""
    num_windows: Annotated[int, Field(ge=1)] = 64
    seq_len: Annotated[int, Field(ge=8, le=131072)] = 256
    gates: GatesConfig = GatesConfig()

    @model_validator(mode="after")
    def _columns_agree(self) -> VerifyConfig:
        refuse_two_columns(self.column, self.messages)
        return self
