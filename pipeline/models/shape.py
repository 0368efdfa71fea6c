"""The sizes and constants of one model, independent of its architecture's spelling of them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.parallel import Axis, Extent


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: "linear" or "llama3"; None of the other fields but `factor` is used by "linear".
        original_max_position_embeddings: in tokens.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def to_dict(self) -> dict[str, str | float | int]:
        """The `rotary_scaling` of TensorRT-LLM's config.json.

        Both spellings of the type are written: 1.x reads either, the 0.12 of Jetson only `type`.
        """
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
    """Sizes of a decoder; global, not per rank. `architecture` is the Hugging Face class name."""

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

    def extent(self, axis: Axis) -> Extent:
        """Size of an axis in this model, in units that may not be cut."""
        return {
            Axis.HIDDEN: Extent(self.hidden_size),
            Axis.Q: Extent(self.num_heads, self.head_size),
            Axis.KV: Extent(self.num_kv_heads, self.head_size),
            Axis.FFN: Extent(self.intermediate_size),
            Axis.VOCAB: Extent(self.vocab_size),
        }[axis]
