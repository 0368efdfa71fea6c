"""What an architecture's table is made of: rules `target <- sources with named axes`, and a scope.

`decoder.py` has the other half: what the architecture computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from pipeline.models.decoder import Decoder
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis


class Scope(Enum):
    """Which pipeline stages hold a weight."""

    FIRST = auto()  # the first stage: embeddings
    LAYER = auto()  # the stage of the layer; names contain {layer}
    LAST = auto()  # the last stage: final norm, lm_head


@dataclass(frozen=True)
class Fused:
    """A source that shares its tensor with others, joined along the output rows.

    Attributes:
        parts: axis of the rows of each part, in stored order.
        index: which part the source is.
        per_kv_head: the rows are interleaved: every KV head's share of part 0, then of part 1, ...;
            otherwise all of part 0 comes first.
    """

    parts: tuple[Axis, ...]
    index: int
    per_kv_head: bool = False


@dataclass(frozen=True)
class Source:
    """One weight of the Hugging Face checkpoint, as [out, in], and how it is stored there.

    Attributes:
        name: without suffix; may contain {layer} and {expert}.
        axes: of each dimension of the weight, whatever its storage.
        transposed: stored as [in, out], as GPT-2's Conv1D does.
        fused: stored in one tensor with others.
        offset: added to every value, in float32: Gemma's norms multiply by 1 + w.
    """

    name: str
    axes: tuple[Axis, ...]
    transposed: bool = False
    fused: Fused | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class WeightRule:
    """`target` (TensorRT-LLM name without suffix) is made of `sources`, joined along dimension 0.

    Each source is cut for the rank first and joined second, so a fused target holds
    [part of source 0; part of source 1; ...].

    Attributes:
        quantized: a linear that a QuantFormat stores in its own way; otherwise it stays plain.
        tied_sources: used instead of `sources` when the model ties its embeddings.
        suffix: of source and target names of a plain weight.
        dtype: safetensors dtype of a plain target.
        when: the models that have this weight; None: all.
        experts: `sources` are those of one {expert}; the target stacks all experts of a rank.
    """

    target: str
    sources: tuple[Source, ...]
    scope: Scope
    quantized: bool = False
    tied_sources: tuple[Source, ...] = ()
    suffix: str = "weight"
    dtype: str = "F16"
    when: Callable[[ModelShape], bool] | None = None
    experts: bool = False

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
        decoder: what the name implies for the network.
        shape_from_hf: ModelShape of a raw config.json; raises CheckpointError.
        formats: names of the weight formats in which such a checkpoint may be stored.
        shares_head: lm_head is left out where one stage holds the embedding too; TensorRT-LLM's reader
            of this architecture always shares the two.
        base_prefix: of every name but lm_head's; files saved from the bare decoder lack it.
    """

    name: str
    rules: tuple[WeightRule, ...]
    decoder: Decoder
    shape_from_hf: Callable[[Mapping[str, Any]], ModelShape]
    ignored_sources: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("fp16",)
    shares_head: bool = False
    base_prefix: str = ""

    def rules_for(self, shape: ModelShape, scope: Scope) -> list[WeightRule]:
        """The rules of one scope that a model of this shape needs."""
        return [
            rule
            for rule in self.rules
            if rule.scope is scope and (rule.when is None or rule.when(shape))
        ]
