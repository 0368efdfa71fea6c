"""Phi-3 and Phi-4: q, k, v and gate, up are stored fused; long contexts by longrope.

`mlp.fc` holds both branches, up_proj first: TensorRT-LLM's swiglu activates the second half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Fused, Source
from pipeline.models.decoder import ROTARY, Decoder, MlpForm
from pipeline.models.decoder_sizes import attention_windows, decoder_sizes
from pipeline.models.hf_fields import HfFields
from pipeline.models.rotary import DEFAULT_BASE, longrope_from_hf
from pipeline.models.rules import (
    EVERY_FORMAT,
    FINAL_NORM,
    HF_LAYER,
    INPUT_NORM,
    POST_NORM,
    embedding,
    head,
    linear,
)
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "Phi3ForCausalLM"


def _qkv(index: int) -> Source:
    fused = Fused((Axis.Q, Axis.KV, Axis.KV), index)
    return Source(f"{HF_LAYER}.self_attn.qkv_proj", (fused.parts[index], Axis.HIDDEN), fused=fused)


def _gate_up(index: int) -> Source:
    fused = Fused((Axis.FFN, Axis.FFN), index)
    return Source(f"{HF_LAYER}.mlp.gate_up_proj", (Axis.FFN, Axis.HIDDEN), fused=fused)


_RULES = (
    embedding(),
    *INPUT_NORM,
    *linear("attention.qkv", _qkv(0), _qkv(1), _qkv(2)),
    *linear("attention.dense", Source(f"{HF_LAYER}.self_attn.o_proj", (Axis.HIDDEN, Axis.Q))),
    *POST_NORM,
    *linear("mlp.fc", _gate_up(1), _gate_up(0)),
    *linear("mlp.proj", Source(f"{HF_LAYER}.mlp.down_proj", (Axis.HIDDEN, Axis.FFN))),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    sizes = decoder_sizes(fields)
    fraction = fields.positive("partial_rotary_factor", 1.0)
    rotary_size = int(sizes["head_size"] * fraction)
    if fraction > 1.0 or rotary_size < 2 or rotary_size % 2:
        what = f"{fraction} rotates {rotary_size} of {sizes['head_size']} channels"
        fields.refuse("partial_rotary_factor", what, "an even number, at most all")
    max_positions = sizes["max_position_embeddings"]
    scaling = longrope_from_hf(fields, rotary_size // 2, max_positions)
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    fields.only("rope_parameters", None, None, "save the model with transformers 4")
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps"),
        rotary_base=fields.positive("rope_theta", DEFAULT_BASE),
        rotary_scaling=scaling,
        hidden_act="swiglu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=False,
        mlp_bias=False,
        position_embedding="rope_gpt_neox" if scaling is None else "long_rope",
        attention_windows=attention_windows(fields, max_positions),
        config_fields={"rotary_pct": fraction},
    )
    fields.finish()
    return shape


_DECODER = Decoder(
    mlp_form=MlpForm.FUSED,
    qkv_bias=False,
    dense_bias=False,
    mlp_bias=False,
    positions=(*ROTARY, "long_rope"),
)

PHI3 = Architecture(
    name=_NAME,
    rules=_RULES,
    decoder=_DECODER,
    shape_from_hf=_shape_from_hf,
    formats=EVERY_FORMAT,
)
