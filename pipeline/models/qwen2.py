"""Qwen2 and Qwen2.5: q, k and v have biases; small models tie their embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture
from pipeline.models.decoder import Decoder, Flag
from pipeline.models.decoder_sizes import decoder_sizes
from pipeline.models.hf_fields import HfFields
from pipeline.models.rotary import rotary_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    FINAL_NORM,
    INPUT_NORM,
    POST_NORM,
    always,
    embedding,
    head,
    llama_attention,
    llama_mlp,
)
from pipeline.models.shape import ModelShape

_NAME = "Qwen2ForCausalLM"

_RULES = (
    embedding(),
    *INPUT_NORM,
    *llama_attention(bias=always),
    *POST_NORM,
    *llama_mlp(),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' Qwen2Config assumes without the field.
    sizes = decoder_sizes(fields, default_num_kv_heads=32)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    fields.only("use_sliding_window", False, False, "every layer sees the whole context")
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act="silu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=True,
        mlp_bias=False,
        # Of the attention's linears TensorRT-LLM gives this class' q, k and v a bias, not the output.
        config_fields={"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False},
    )
    fields.finish()
    return shape


_DECODER = Decoder(qkv_bias=Flag("attn_bias", default=True), dense_bias=False)

QWEN2 = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
)
