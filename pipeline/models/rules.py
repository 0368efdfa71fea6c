"""Building blocks of the tables: what several families have in common.

Target names: the activation works on `mlp.fc` (gate_proj); `mlp.gate` is the linear branch (up_proj).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.models.architecture import Scope, Source, WeightRule
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

LAYER = "transformer.layers.{layer}"
"""Prefix of the targets of a layer; the number counts from the first layer of the stage."""
HF_LAYER = "model.layers.{layer}"
"""Prefix of the sources of a layer in the families that descend from Llama."""

EVERY_FORMAT = (
    "fp16",
    "int4_awq",
    "int4_gptq",
    "w4a8_awq",
    "fp8",
    "int8_sq",
    "int8_wo",
    "mixed",
)
"""Weight formats in which a checkpoint may be stored; so far no architecture lacks one."""

Condition = Callable[[ModelShape], bool]


def always(shape: ModelShape) -> bool:
    """Every model has it."""
    return True


def attention_bias(shape: ModelShape) -> bool:
    """The linears of attention have biases."""
    return shape.attention_bias


def mlp_bias(shape: ModelShape) -> bool:
    """The linears of the MLP have biases."""
    return shape.mlp_bias


def linear(target: str, *sources: Source, bias: Condition | None = None) -> tuple[WeightRule, ...]:
    """A linear of a layer, and its bias in the models of which `bias` is true.

    The bias follows the output rows: cut in a column-parallel linear, whole on every rank in a
    row-parallel one, where it is added once, after the all-reduce.
    """
    weight = WeightRule(f"{LAYER}.{target}", sources, Scope.LAYER, quantized=True)
    if bias is None:
        return (weight,)
    rows = tuple(replace(source, axes=source.axes[:1], transposed=False) for source in sources)
    return weight, replace(weight, sources=rows, quantized=False, suffix="bias", when=bias)


def norm(
    target: str,
    source: str,
    scope: Scope = Scope.LAYER,
    *,
    bias: Condition | None = None,
    offset: float = 0.0,
    axis: Axis = Axis.HIDDEN,
    when: Condition | None = None,
) -> tuple[WeightRule, ...]:
    """A norm's weight, plus `offset`, and its bias if it has one."""
    weight = WeightRule(target, (Source(source, (axis,), offset=offset),), scope, when=when)
    if bias is None:
        return (weight,)
    return weight, replace(weight, suffix="bias", when=when or bias)


def embedding(source: str = "model.embed_tokens") -> WeightRule:
    """The table of token embeddings."""
    return WeightRule("transformer.vocab_embedding", (vocabulary(source),), Scope.FIRST)


def head(source: str = "lm_head", tied: str = "model.embed_tokens") -> WeightRule:
    """lm_head, a copy of the embedding where the model ties the two."""
    return WeightRule(
        "lm_head", (vocabulary(source),), Scope.LAST, tied_sources=(vocabulary(tied),)
    )


def vocabulary(name: str) -> Source:
    """A table with one row for each token."""
    return Source(name, (Axis.VOCAB, Axis.HIDDEN))


def llama_attention(
    *, bias: Condition | None = None, dense_bias: Condition | None = None
) -> tuple[WeightRule, ...]:
    """q, k and v joined, and the output projection."""
    attention = f"{HF_LAYER}.self_attn"
    return (
        *linear(
            "attention.qkv",
            Source(f"{attention}.q_proj", (Axis.Q, Axis.HIDDEN)),
            Source(f"{attention}.k_proj", (Axis.KV, Axis.HIDDEN)),
            Source(f"{attention}.v_proj", (Axis.KV, Axis.HIDDEN)),
            bias=bias,
        ),
        *linear(
            "attention.dense",
            Source(f"{attention}.o_proj", (Axis.HIDDEN, Axis.Q)),
            bias=dense_bias,
        ),
    )


def llama_mlp(*, bias: Condition | None = None) -> tuple[WeightRule, ...]:
    """The gated MLP: proj(act(fc(x)) * gate(x))."""
    mlp = f"{HF_LAYER}.mlp"
    return (
        *linear("mlp.fc", Source(f"{mlp}.gate_proj", (Axis.FFN, Axis.HIDDEN)), bias=bias),
        *linear("mlp.gate", Source(f"{mlp}.up_proj", (Axis.FFN, Axis.HIDDEN)), bias=bias),
        *linear("mlp.proj", Source(f"{mlp}.down_proj", (Axis.HIDDEN, Axis.FFN)), bias=bias),
    )


INPUT_NORM = norm(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm")
POST_NORM = norm(f"{LAYER}.post_layernorm", f"{HF_LAYER}.post_attention_layernorm")
FINAL_NORM = norm("transformer.ln_f", "model.norm", Scope.LAST)
