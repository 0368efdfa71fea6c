"""What an architecture's table is made of: rules `target <- sources with named axes`, and a scope."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis


class Scope(Enum):
    """Which pipeline stages hold a weight."""

    FIRST = auto()  # the first stage: embeddings
    LAYER = auto()  # the stage of the layer; names contain {layer}
    LAST = auto()  # the last stage: final norm, lm_head


@dataclass(frozen=True)
class Source:
    """One weight of the Hugging Face checkpoint: name without suffix, and the axis of each dimension."""

    name: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class WeightRule:
    """`target` (TensorRT-LLM name without suffix) is made of `sources`, joined along dimension 0.

    Each source is cut for the rank first and joined second, so a fused target holds
    [part of source 0; part of source 1; ...].

    Attributes:
        quantized: a linear that a QuantFormat stores in its own way; otherwise it stays plain.
        tied_sources: used instead of `sources` when the model ties its embeddings.
    """

    target: str
    sources: tuple[Source, ...]
    scope: Scope
    quantized: bool = False
    tied_sources: tuple[Source, ...] = ()

    def sources_for(self, shape: ModelShape) -> tuple[Source, ...]:
        """The sources in a model of this shape."""
        if shape.tie_word_embeddings and self.tied_sources:
            return self.tied_sources
        return self.sources


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: Hugging Face class name; also the `architecture` of TensorRT-LLM's config.json.
        ignored_sources: full names of tensors that old checkpoints carry and nobody needs.
        shape_from_hf: ModelShape of a raw config.json; raises CheckpointError.
    """

    name: str
    rules: tuple[WeightRule, ...]
    shape_from_hf: Callable[[Mapping[str, Any]], ModelShape]
    ignored_sources: tuple[str, ...] = ()
