"""Gemma 1: norms multiply by 1 + w, the embedding is scaled by the network, lm_head is always tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Scope
from pipeline.models.decoder import GELU, Decoder
from pipeline.models.decoder_sizes import decoder_sizes
from pipeline.models.hf_fields import HfFields
from pipeline.models.rotary import rotary_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    HF_LAYER,
    LAYER,
    embedding,
    head,
    llama_attention,
    llama_mlp,
    norm,
)
from pipeline.models.shape import ModelShape

_NAME = "GemmaForCausalLM"

_RULES = (
    embedding(),
    *norm(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm", offset=1.0),
    *llama_attention(),
    *norm(f"{LAYER}.post_layernorm", f"{HF_LAYER}.post_attention_layernorm", offset=1.0),
    *llama_mlp(),
    *norm("transformer.ln_f", "model.norm", Scope.LAST, offset=1.0),
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' GemmaConfig assumes without the fields.
    sizes = decoder_sizes(fields, default_head_size=256, default_num_kv_heads=16)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    hidden_act = fields.choice("hidden_act", ("gelu_pytorch_tanh", "gelu"), "gelu_pytorch_tanh")
    # transformers documents that it overwrites hidden_act, and 4.57 never reads it.
    if fields.get("hidden_activation") not in (None, hidden_act):
        what = f"{fields.get('hidden_activation')!r} contradicts hidden_act {hidden_act!r}"
        fix = "write into hidden_act what the model was trained with"
        fields.refuse("hidden_activation", what, "null, the same as hidden_act", fix)
    fields.only("attention_bias", False, False, "q, k, v and o must have no bias")
    fields.only("tie_word_embeddings", True, True, "TensorRT-LLM's Gemma has no lm_head of its own")
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps", 1e-6),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act=hidden_act,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        config_fields={"attn_bias": False, "mlp_bias": False},
    )
    fields.finish()
    return shape


_DECODER = Decoder(activations=GELU, scaled_embedding=True, windowed=False)

GEMMA = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    shares_head=True,
    formats=EVERY_FORMAT,
)
