"""Falcon with rotary positions: 7B (one KV head), 40B and 180B (new decoder), and Falcon 2.

The fused rows are, for every KV head, its query heads, then k, then v; for one KV head that is
[q; k; v]. Models with alibi (Falcon-RW) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Fused, Scope, Source, WeightRule
from pipeline.models.decoder import GELU, PRE_NORM, Decoder, Flag, MlpForm, Norm, Residual
from pipeline.models.hf_fields import MAX_LAYERS, HfFields
from pipeline.models.rotary import unscaled_rotary_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    LAYER,
    Condition,
    always,
    attention_bias,
    embedding,
    head,
    linear,
    mlp_bias,
    norm,
)
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "FalconForCausalLM"
_BASE = "transformer."
_HF = f"{_BASE}h.{{layer}}"
_NORMS = "num_ln_in_parallel_attn"
_PARALLEL = "parallel_attention"
_NEW = "new_decoder_architecture"


def _two_norms(shape: ModelShape) -> bool:
    """Attention and MLP run in parallel, each after a norm of its own."""
    return bool(shape.config_fields[_NORMS] == 2)


def _one_norm(shape: ModelShape) -> bool:
    return not _two_norms(shape)


def _sequential(shape: ModelShape) -> bool:
    return not shape.config_fields[_PARALLEL]


def _qkv(index: int) -> Source:
    fused = Fused((Axis.Q, Axis.KV, Axis.KV), index, per_kv_head=True)
    axes = (fused.parts[index], Axis.HIDDEN)
    return Source(f"{_HF}.self_attention.query_key_value", axes, fused=fused)


def _layer_norm(target: str, source: str, when: Condition) -> tuple[WeightRule, ...]:
    return norm(f"{LAYER}.{target}", f"{_HF}.{source}", bias=when, when=when)


_RULES = (
    embedding(f"{_BASE}word_embeddings"),
    *_layer_norm("input_layernorm", "input_layernorm", _one_norm),
    *_layer_norm("input_layernorm", "ln_attn", _two_norms),
    *_layer_norm("mlp_layernorm", "ln_mlp", _two_norms),
    *_layer_norm("post_layernorm", "post_attention_layernorm", _sequential),
    *linear("attention.qkv", _qkv(0), _qkv(1), _qkv(2), bias=attention_bias),
    *linear(
        "attention.dense",
        Source(f"{_HF}.self_attention.dense", (Axis.HIDDEN, Axis.Q)),
        bias=attention_bias,
    ),
    *linear("mlp.fc", Source(f"{_HF}.mlp.dense_h_to_4h", (Axis.FFN, Axis.HIDDEN)), bias=mlp_bias),
    *linear("mlp.proj", Source(f"{_HF}.mlp.dense_4h_to_h", (Axis.HIDDEN, Axis.FFN)), bias=mlp_bias),
    *norm("transformer.ln_f", f"{_BASE}ln_f", Scope.LAST, bias=always),
    head(tied=f"{_BASE}word_embeddings"),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    new_decoder = fields.flag("new_decoder_architecture", default=False)
    parallel = fields.flag("parallel_attn", default=True)
    num_kv_heads = num_heads
    if new_decoder:
        num_kv_heads = fields.size("num_kv_heads", num_heads)
        fields.only("parallel_attn", True, True, "the new decoder is parallel")
    elif fields.flag("multi_query", default=True):
        num_kv_heads = 1
    else:
        fields.only("num_kv_heads", num_heads, num_heads, "every head has its own k and v")
    if not fields.problems:
        _check_heads(fields, hidden_size, num_heads, num_kv_heads)
    num_norms = fields.size(_NORMS, 2 if new_decoder else 1, limit=2 if new_decoder else 1)
    rotary_base = unscaled_rotary_from_hf(fields)
    fields.only("head_dim", None, None, "a head has hidden_size / num_attention_heads channels")
    fields.only("alibi", False, False, "positions must be rotary")
    bias = fields.flag("bias", default=False)
    shape = ModelShape(
        architecture=_NAME,
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers", limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=hidden_size // num_heads,
        intermediate_size=fields.size("ffn_hidden_size", 4 * hidden_size),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("max_position_embeddings", 2048),
        norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        rotary_base=rotary_base,
        rotary_scaling=None,
        hidden_act=fields.choice("activation", ("gelu",), "gelu"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        attention_bias=bias,
        mlp_bias=bias,
        config_fields={
            "bias": bias,
            _PARALLEL: parallel,
            _NEW: new_decoder,
            _NORMS: num_norms if new_decoder else None,
        },
    )
    fields.finish()
    return shape


def _check_heads(fields: HfFields, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        what = f"{num_heads} heads of {hidden_size} channels"
        fields.refuse("num_attention_heads", what, "heads of an even number of channels")
    if num_heads % num_kv_heads:
        what = f"{num_kv_heads} does not divide {num_heads} attention heads"
        fields.refuse("num_kv_heads", what)


def _residual(options: Mapping[str, object]) -> Residual:
    """The new decoder is always parallel, with two norms unless num_ln_in_parallel_attn says one."""
    if options[_NEW] and options[_NORMS] != 1:
        return Residual(True, "input_layernorm", "mlp_layernorm")
    if options[_NEW] or options[_PARALLEL]:
        return Residual(True, "input_layernorm", "input_layernorm")
    return PRE_NORM


_DECODER = Decoder(
    norm=Norm.LAYER,
    options={
        _NEW: (False, True),
        _PARALLEL: (False, True),
        _NORMS: (None, 1, 2),
    },
    residual=_residual,
    mlp_form=MlpForm.PLAIN,
    activations=GELU,
    qkv_bias=Flag("bias"),
    dense_bias=Flag("bias"),
    mlp_bias=Flag("bias"),
    windowed=False,
)

FALCON = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
    # A buffer that older checkpoints carry; it follows from rope_theta.
    ignored_sources=(f"{_HF}.self_attention.rotary_emb.inv_freq",),
    base_prefix=_BASE,
)
