"""GPT-2: Conv1D weights stored as [in, out], learned positions, LayerNorms and biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Fused, Scope, Source, WeightRule
from pipeline.models.decoder import GELU, LEARNED, Decoder, Flag, MlpForm, Norm
from pipeline.models.hf_fields import MAX_LAYERS, HfFields
from pipeline.models.rules import EVERY_FORMAT, LAYER, always, embedding, head, linear, norm
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "GPT2LMHeadModel"
_BASE = "transformer."
_HF = f"{_BASE}h.{{layer}}"


def _conv1d(name: str, *axes: Axis, fused: Fused | None = None) -> Source:
    return Source(f"{_HF}.{name}", axes, transposed=True, fused=fused)


def _qkv(index: int) -> Source:
    fused = Fused((Axis.Q, Axis.KV, Axis.KV), index)
    return _conv1d("attn.c_attn", fused.parts[index], Axis.HIDDEN, fused=fused)


_RULES = (
    embedding(f"{_BASE}wte"),
    WeightRule(
        "transformer.position_embedding",
        (Source(f"{_BASE}wpe", (Axis.POSITION, Axis.HIDDEN)),),
        Scope.FIRST,
    ),
    *norm(f"{LAYER}.input_layernorm", f"{_HF}.ln_1", bias=always),
    *linear("attention.qkv", _qkv(0), _qkv(1), _qkv(2), bias=always),
    *linear("attention.dense", _conv1d("attn.c_proj", Axis.HIDDEN, Axis.Q), bias=always),
    *norm(f"{LAYER}.post_layernorm", f"{_HF}.ln_2", bias=always),
    *linear("mlp.fc", _conv1d("mlp.c_fc", Axis.FFN, Axis.HIDDEN), bias=always),
    *linear("mlp.proj", _conv1d("mlp.c_proj", Axis.HIDDEN, Axis.FFN), bias=always),
    *norm("transformer.ln_f", f"{_BASE}ln_f", Scope.LAST, bias=always),
    head(tied=f"{_BASE}wte"),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    hidden_size, num_heads = fields.size("n_embd"), fields.size("n_head")
    if not fields.problems and hidden_size % num_heads:
        fields.refuse("n_head", f"{num_heads} does not divide n_embd {hidden_size}")
    hidden_act = fields.choice(
        "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu"), "gelu_new"
    )
    fields.only("scale_attn_weights", True, True, "attention is scaled")
    fields.only("scale_attn_by_inverse_layer_idx", False, False, "every layer is scaled alike")
    fields.only("add_cross_attention", False, False, "a decoder alone")
    shape = ModelShape(
        architecture=_NAME,
        hidden_size=hidden_size,
        num_layers=fields.size("n_layer", limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        intermediate_size=fields.size("n_inner", 4 * hidden_size),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("n_positions"),
        norm_epsilon=fields.positive("layer_norm_epsilon", 1e-5),
        rotary_base=10000.0,
        rotary_scaling=None,
        hidden_act=hidden_act,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=True),
        attention_bias=True,
        mlp_bias=True,
        position_embedding="learned_absolute",
        config_fields={"gpt_variant": "gpt2", "bias": True},
    )
    fields.finish()
    return shape


_DECODER = Decoder(
    norm=Norm.LAYER,
    mlp_form=MlpForm.PLAIN,
    activations=GELU,
    qkv_bias=Flag("bias", default=True),
    dense_bias=Flag("bias", default=True),
    mlp_bias=Flag("bias", default=True),
    positions=LEARNED,
    windowed=False,
)

GPT2 = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
    # The causal mask, as a buffer, and the value it masks with.
    ignored_sources=(f"{_HF}.attn.bias", f"{_HF}.attn.masked_bias"),
    base_prefix=_BASE,
)
