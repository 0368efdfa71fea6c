"""Architectures as tables. One more: one file beside llama.py and one line in `ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import CheckpointError, Problem
from pipeline.models.architecture import Architecture, Scope, Source, WeightRule
from pipeline.models.llama import LLAMA
from pipeline.models.shape import ModelShape, RotaryScaling

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelShape",
    "RotaryScaling",
    "Scope",
    "Source",
    "WeightRule",
    "shape_from_hf",
]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture for architecture in (LLAMA,)
}


def shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    """ModelShape of a raw Hugging Face config.json.

    Raises:
        CheckpointError: unsupported architecture (names those that are), or every field that is missing,
            wrong or not supported.
    """
    supported = ", ".join(sorted(ARCHITECTURES))
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        what = "missing" if names is None else f"{names!r} is not a list with one class name"
        raise CheckpointError(Problem("config.json: architectures", what, f"one of {supported}"))
    if names[0] not in ARCHITECTURES:
        what = f"{names[0]!r} is not supported"
        raise CheckpointError(Problem("config.json: architectures", what, supported))
    return ARCHITECTURES[names[0]].shape_from_hf(config)
