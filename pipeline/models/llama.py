"""Llama 1, 2 and 3.x.

Target names: the activation works on `mlp.fc` (gate_proj); `mlp.gate` is the linear branch (up_proj).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Scope, Source, WeightRule
from pipeline.models.hf_fields import MAX_LAYERS, HfFields
from pipeline.models.rotary import rotary_from_hf
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "LlamaForCausalLM"
_HF = "model.layers.{layer}"
_TRTLLM = "transformer.layers.{layer}"

_RULES = (
    WeightRule(
        "transformer.vocab_embedding",
        (Source("model.embed_tokens", (Axis.VOCAB, Axis.HIDDEN)),),
        Scope.FIRST,
    ),
    WeightRule(
        f"{_TRTLLM}.input_layernorm",
        (Source(f"{_HF}.input_layernorm", (Axis.HIDDEN,)),),
        Scope.LAYER,
    ),
    WeightRule(
        f"{_TRTLLM}.attention.qkv",
        (
            Source(f"{_HF}.self_attn.q_proj", (Axis.Q, Axis.HIDDEN)),
            Source(f"{_HF}.self_attn.k_proj", (Axis.KV, Axis.HIDDEN)),
            Source(f"{_HF}.self_attn.v_proj", (Axis.KV, Axis.HIDDEN)),
        ),
        Scope.LAYER,
        quantized=True,
    ),
    WeightRule(
        f"{_TRTLLM}.attention.dense",
        (Source(f"{_HF}.self_attn.o_proj", (Axis.HIDDEN, Axis.Q)),),
        Scope.LAYER,
        quantized=True,
    ),
    WeightRule(
        f"{_TRTLLM}.post_layernorm",
        (Source(f"{_HF}.post_attention_layernorm", (Axis.HIDDEN,)),),
        Scope.LAYER,
    ),
    WeightRule(
        f"{_TRTLLM}.mlp.fc",
        (Source(f"{_HF}.mlp.gate_proj", (Axis.FFN, Axis.HIDDEN)),),
        Scope.LAYER,
        quantized=True,
    ),
    WeightRule(
        f"{_TRTLLM}.mlp.gate",
        (Source(f"{_HF}.mlp.up_proj", (Axis.FFN, Axis.HIDDEN)),),
        Scope.LAYER,
        quantized=True,
    ),
    WeightRule(
        f"{_TRTLLM}.mlp.proj",
        (Source(f"{_HF}.mlp.down_proj", (Axis.HIDDEN, Axis.FFN)),),
        Scope.LAYER,
        quantized=True,
    ),
    WeightRule(
        "transformer.ln_f",
        (Source("model.norm", (Axis.HIDDEN,)),),
        Scope.LAST,
    ),
    WeightRule(
        "lm_head",
        (Source("lm_head", (Axis.VOCAB, Axis.HIDDEN)),),
        Scope.LAST,
        tied_sources=(Source("model.embed_tokens", (Axis.VOCAB, Axis.HIDDEN)),),
    ),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    head_size = 2 if fields.problems else _head_size(fields, hidden_size, num_heads)
    if not fields.problems and num_heads % num_kv_heads:
        fields.refuse(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads"
        )
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    fields.only("attention_bias", False, False, "q, k, v and o must have no bias")
    fields.only("mlp_bias", False, False, "gate, up and down must have no bias")
    fields.only("partial_rotary_factor", 1.0, 1.0, "every channel of a head is rotated")
    shape = ModelShape(
        architecture=_NAME,
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers", limit=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_epsilon=fields.positive("rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act="silu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=False,
        mlp_bias=False,
    )
    fields.finish()
    return shape


def _head_size(fields: HfFields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        fields.refuse(
            "head_dim", f"missing, and hidden_size {hidden_size} / {num_heads} heads is not whole"
        )
        return 2
    head_size = fields.size("head_dim", max(hidden_size // num_heads, 1))
    if head_size % 2:
        fields.refuse("head_dim", f"{head_size}", "an even number: rotary embedding works on pairs")
    return head_size


LLAMA = Architecture(
    name=_NAME,
    rules=_RULES,
    shape_from_hf=_shape_from_hf,
    # A buffer that Llama 1 and 2 checkpoints carry; it follows from rope_theta.
    ignored_sources=(f"{_HF}.self_attn.rotary_emb.inv_freq",),
)
