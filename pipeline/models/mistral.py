"""Mistral: Llama with a sliding window, and without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture
from pipeline.models.decoder import Decoder
from pipeline.models.decoder_sizes import attention_windows, decoder_sizes
from pipeline.models.hf_fields import HfFields
from pipeline.models.rotary import rotary_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    FINAL_NORM,
    INPUT_NORM,
    POST_NORM,
    embedding,
    head,
    llama_attention,
    llama_mlp,
)
from pipeline.models.shape import ModelShape

_NAME = "MistralForCausalLM"

_RULES = (
    embedding(),
    *INPUT_NORM,
    *llama_attention(),
    *POST_NORM,
    *llama_mlp(),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' MistralConfig assumes without the field.
    sizes = decoder_sizes(fields, default_num_kv_heads=8)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act="silu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=False,
        mlp_bias=False,
        attention_windows=attention_windows(fields, sizes["max_position_embeddings"]),
        config_fields={"attn_bias": False, "mlp_bias": False},
    )
    fields.finish()
    return shape


_DECODER = Decoder()

MISTRAL = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
)
