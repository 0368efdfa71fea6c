"""The sizes and constants of one model, independent of its architecture's spelling of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.parallel import Axis, Extent


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: "linear" or "dynamic" (only `factor`), "llama3" (`factor` to
            `original_max_position_embeddings`), "longrope" (the factors of each frequency).
        original_max_position_embeddings: in tokens.
        short_factor: of each frequency, for contexts up to that length; `long_factor` beyond.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, str | float | int]:
        """The `rotary_scaling` of TensorRT-LLM's config.json; not for "longrope", which has its own.

        Both spellings of the type are written: 1.x reads either, the 0.12 of Jetson only `type`.
        """
        assert self.kind != "longrope"
        fields: dict[str, str | float | int | None] = {
            "rope_type": self.kind,
            "type": self.kind,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; global, not per rank. `architecture` is the Hugging Face class name.

    Attributes:
        intermediate_size: of the MLP, or of each expert.
        hidden_act: as TensorRT-LLM's config.json names it.
        position_embedding: TensorRT-LLM's position_embedding_type.
        attention_windows: how many positions back a layer sees, in tokens, repeated over the layers;
            empty: all of them.
        num_experts: 0 without mixture of experts; a token goes to `experts_per_token` of them.
        config_fields: further fields of TensorRT-LLM's config.json, in file order.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    position_embedding: str = "rope_gpt_neox"
    qk_norm: bool = False
    attention_windows: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    config_fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    padded_intermediate_size: int = 0
    """With the zeros that `mapping.pad_ffn` adds; 0: none."""

    def extent(self, axis: Axis) -> Extent:
        """Size of an axis in this model, in units that may not be cut."""
        return self._extents[axis]

    @cached_property
    def _extents(self) -> dict[Axis, Extent]:
        return {
            Axis.HIDDEN: Extent(self.hidden_size),
            Axis.Q: Extent(self.num_heads, self.head_size),
            Axis.KV: Extent(self.num_kv_heads, self.head_size),
            Axis.FFN: Extent(self.intermediate_size, padded_units=self.padded_intermediate_size),
            Axis.VOCAB: Extent(self.vocab_size),
            Axis.HEAD: Extent(self.head_size),
            Axis.POSITION: Extent(self.max_position_embeddings),
            Axis.EXPERT: Extent(self.num_experts),
            Axis.EXPERT_FFN: Extent(
                self.intermediate_size, padded_units=self.padded_intermediate_size
            ),
        }
