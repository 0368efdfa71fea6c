"""What the name of an architecture implies for the network, as data: the second half of its table.

Sizes and most options stand in TensorRT-LLM's config.json; what is not there, its class of this name
knows, and so must we. `pipeline.network.features` reads a config.json by such a declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class Norm(Enum):
    """What normalizes the residual stream; both work along the last axis."""

    RMS = auto()  # weight only
    LAYER = auto()  # subtracts the mean; weight and bias


class Activation(Enum):
    """The nonlinearity of the feed-forward network."""

    SILU = auto()
    GELU = auto()  # exact, by the error function
    GELU_TANH = auto()


class MlpForm(Enum):
    """How `fc`, `gate` and `proj` make a feed-forward network."""

    GATED = auto()  # proj(act(fc x) * gate x)
    FUSED = auto()  # fc holds [linear rows; activated rows]: proj(act(second half) * first half)
    PLAIN = auto()  # proj(act(fc x))


@dataclass(frozen=True)
class Residual:
    """Where a layer normalizes, and what its feed-forward network reads.

    Attributes:
        parallel: attention and feed-forward network both read the layer's input and are added to it
            together; otherwise the feed-forward network reads what attention left.
        before_attention, before_mlp: names of norms; the same name twice is one norm for both.
        after_attention, after_mlp: norms of a branch before it is added; None: there is none.
    """

    parallel: bool
    before_attention: str
    before_mlp: str
    after_attention: str | None = None
    after_mlp: str | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        """Every norm once, in the order of execution."""
        names = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(dict.fromkeys(name for name in names if name is not None))


PRE_NORM = Residual(False, "input_layernorm", "post_layernorm")

# Names as transformers 4.57 computes them, the judge of `verify`; so "gelu" is erf, in Gemma too, though
# Gemma was trained by the tanh formula. TensorRT-LLM itself computes "gelu" by the tanh formula.
SILU: Mapping[str, Activation] = {"silu": Activation.SILU, "swiglu": Activation.SILU}
GELU: Mapping[str, Activation] = {
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
}


@dataclass(frozen=True)
class Flag:
    """A field of config.json that is true or false; `default` where it is absent."""

    field: str
    default: bool = False


ROTARY = ("rope_gpt_neox",)
LEARNED = ("learned_absolute",)


@dataclass(frozen=True)
class Decoder:
    """One architecture's network; the defaults are Llama's.

    Attributes:
        options: further fields of config.json, each with the values it may have; the first is that of
            an absent one. `residual` is told their values.
        activations: names that `hidden_act` may have.
        qkv_bias, dense_bias, mlp_bias: linears that must have a bias; every other linear may have one.
        qk_norm: query and key heads are normalized before they are rotated.
        positions: values that `position_embedding_type` may have: `LEARNED`, or kinds of rotation.
        windowed: `max_attention_window` is obeyed.
        experts: the feed-forward network is a mixture of them, described by the field `moe`.
        scaled_embedding: the embedding is multiplied by the root of the hidden size.
        query_scalar: field whose inverse root is the factor of the attention scores; its default, and
            with "" the only value, is the head size.
        softcapped: `attn_logit_softcapping` and `final_logit_softcapping` are obeyed.
    """

    norm: Norm = Norm.RMS
    options: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    residual: Residual | Callable[[Mapping[str, object]], Residual] = PRE_NORM
    mlp_form: MlpForm = MlpForm.GATED
    activations: Mapping[str, Activation] = field(default_factory=lambda: SILU)
    qkv_bias: Flag | bool = Flag("attn_bias")
    dense_bias: Flag | bool = Flag("attn_bias")
    mlp_bias: Flag | bool = Flag("mlp_bias")
    qk_norm: bool = False
    positions: tuple[str, ...] = ROTARY
    windowed: bool = True
    experts: bool = False
    scaled_embedding: bool = False
    query_scalar: str = ""
    softcapped: bool = False
