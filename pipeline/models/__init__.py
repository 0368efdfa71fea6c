"""Architectures as tables. One more: one file beside llama.py and one line in `ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import CheckpointError, Problem
from pipeline.models.architecture import Architecture, Fused, Scope, Source, WeightRule
from pipeline.models.falcon import FALCON
from pipeline.models.gemma import GEMMA
from pipeline.models.gemma2 import GEMMA2
from pipeline.models.gpt2 import GPT2
from pipeline.models.gpt_neox import GPT_NEOX
from pipeline.models.llama import LLAMA
from pipeline.models.mistral import MISTRAL
from pipeline.models.mixtral import MIXTRAL
from pipeline.models.phi3 import PHI3
from pipeline.models.qwen2 import QWEN2
from pipeline.models.qwen3 import QWEN3
from pipeline.models.shape import ModelShape, RotaryScaling

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Fused",
    "ModelShape",
    "RotaryScaling",
    "Scope",
    "Source",
    "WeightRule",
    "shape_from_hf",
]

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        PHI3,
        GEMMA,
        GEMMA2,
        GPT2,
        GPT_NEOX,
        FALCON,
        MIXTRAL,
    )
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
