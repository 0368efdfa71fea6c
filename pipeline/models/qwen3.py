"""Qwen3, dense: the q and k of every head are normalized before they are rotated; no biases."""

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
    LAYER,
    POST_NORM,
    embedding,
    head,
    llama_attention,
    llama_mlp,
    norm,
)
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "Qwen3ForCausalLM"

_RULES = (
    embedding(),
    *INPUT_NORM,
    *llama_attention(),
    *norm(f"{LAYER}.attention.q_layernorm", f"{HF_LAYER}.self_attn.q_norm", axis=Axis.HEAD),
    *norm(f"{LAYER}.attention.k_layernorm", f"{HF_LAYER}.self_attn.k_norm", axis=Axis.HEAD),
    *POST_NORM,
    *llama_mlp(),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' Qwen3Config assumes without the fields.
    sizes = decoder_sizes(fields, default_head_size=128, default_num_kv_heads=32)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    fields.only("attention_bias", False, False, "TensorRT-LLM's Qwen3 has no bias")
    fields.only("use_sliding_window", False, False, "every layer sees the whole context")
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
        qk_norm=True,
        config_fields={"qwen_type": "qwen3", "attn_bias": False, "mlp_bias": False},
    )
    fields.finish()
    return shape


_DECODER = Decoder(qk_norm=True)

QWEN3 = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
)
