"""The sections `run` and `rehearsal` of a YAML: what stays of a run, and how much of it is rehearsed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.calibration_config import Section


class RunConfig(Section):
    """What a run leaves in the store. It changes no result."""

    keep: Literal["all", "needed"] = "all"
    """needed: an artifact goes as soon as no step that is still to be made reads it."""


class RehearsalConfig(Section):
    """How much text a build with synthetic weights reads: random weights learn nothing from more.

    Only where the YAML asks for more than this.
    """

    num_samples: Annotated[int, Field(ge=1, le=65536)] = 4
    """Instead of quantize.calibration.num_samples."""
    seq_len: Annotated[int, Field(ge=8, le=131072)] = 128
    """Instead of quantize.calibration.seq_len."""
    num_windows: Annotated[int, Field(ge=1)] = 2
    """Instead of verify.num_windows."""
    window_len: Annotated[int, Field(ge=8, le=131072)] = 128
    """Instead of verify.seq_len."""
