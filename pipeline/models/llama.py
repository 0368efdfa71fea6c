"""Llama 1, 2 and 3.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture
from pipeline.models.decoder import Decoder
from pipeline.models.decoder_sizes import decoder_sizes
from pipeline.models.hf_fields import HfFields
from pipeline.models.rotary import rotary_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    FINAL_NORM,
    HF_LAYER,
    INPUT_NORM,
    POST_NORM,
    attention_bias,
    embedding,
    head,
    llama_attention,
    llama_mlp,
    mlp_bias,
)
from pipeline.models.shape import ModelShape

_NAME = "LlamaForCausalLM"

_RULES = (
    embedding(),
    *INPUT_NORM,
    *llama_attention(bias=attention_bias, dense_bias=attention_bias),
    *POST_NORM,
    *llama_mlp(bias=mlp_bias),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    sizes = decoder_sizes(fields)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    attn_biased = fields.flag("attention_bias", default=False)
    mlp_biased = fields.flag("mlp_bias", default=False)
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act="silu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=attn_biased,
        mlp_bias=mlp_biased,
        config_fields={"attn_bias": attn_biased, "mlp_bias": mlp_biased},
    )
    fields.finish()
    return shape


_DECODER = Decoder()

LLAMA = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    # A buffer that Llama 1 and 2 checkpoints carry; it follows from rope_theta.
    ignored_sources=(f"{HF_LAYER}.self_attn.rotary_emb.inv_freq",),
    formats=EVERY_FORMAT,
)
