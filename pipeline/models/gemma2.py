"""Gemma 2: Gemma with a norm after attention and MLP too, soft caps, and every other layer windowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Scope
from pipeline.models.decoder import GELU, Decoder, Residual
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

_NAME = "Gemma2ForCausalLM"
_WINDOWED, _WHOLE = "sliding_attention", "full_attention"

_RULES = (
    embedding(),
    *norm(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm", offset=1.0),
    *llama_attention(),
    *norm(f"{LAYER}.post_layernorm", f"{HF_LAYER}.post_attention_layernorm", offset=1.0),
    *norm(
        f"{LAYER}.pre_feedforward_layernorm",
        f"{HF_LAYER}.pre_feedforward_layernorm",
        offset=1.0,
    ),
    *llama_mlp(),
    *norm(
        f"{LAYER}.post_feedforward_layernorm",
        f"{HF_LAYER}.post_feedforward_layernorm",
        offset=1.0,
    ),
    *norm("transformer.ln_f", "model.norm", Scope.LAST, offset=1.0),
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' Gemma2Config assumes without the fields.
    sizes = decoder_sizes(fields, default_head_size=256, default_num_kv_heads=4)
    rotary_base, rotary_scaling = rotary_from_hf(fields)
    hidden_act = fields.choice(
        "hidden_activation", ("gelu_pytorch_tanh", "gelu"), "gelu_pytorch_tanh"
    )
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
        attention_windows=_windows(fields, sizes["num_layers"], sizes["max_position_embeddings"]),
        config_fields={
            "attn_bias": False,
            "mlp_bias": False,
            "inter_layernorms": True,
            "query_pre_attn_scalar": fields.positive("query_pre_attn_scalar", 256),
            "final_logit_softcapping": fields.optional_positive("final_logit_softcapping", 30.0),
            "attn_logit_softcapping": fields.optional_positive("attn_logit_softcapping", 50.0),
        },
    )
    fields.finish()
    return shape


def _windows(fields: HfFields, num_layers: int, max_position_embeddings: int) -> tuple[int, ...]:
    window = fields.size("sliding_window", 4096)
    if window >= max_position_embeddings:
        return ()
    kinds = fields.get("layer_types")
    if kinds is None:
        return (window, max_position_embeddings)
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in (_WINDOWED, _WHOLE) for kind in kinds)
    ):
        what = f"{len(kinds)} entries" if isinstance(kinds, list) else f"{kinds!r}"
        fields.refuse("layer_types", what, f"{num_layers} of {_WINDOWED}, {_WHOLE}")
        return ()
    return tuple(window if kind == _WINDOWED else max_position_embeddings for kind in kinds)


_DECODER = Decoder(
    residual=Residual(
        parallel=False,
        before_attention="input_layernorm",
        after_attention="post_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    activations=GELU,
    scaled_embedding=True,
    query_scalar="query_pre_attn_scalar",
    softcapped=True,
)

GEMMA2 = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    shares_head=True,
    formats=EVERY_FORMAT,
)
