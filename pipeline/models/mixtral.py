"""Mixtral: Mistral with a mixture of experts; the router stays float32.

The experts of a rank are stacked; each holds both branches, w3 (up) first: TensorRT-LLM's swiglu
activates the second half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.models.architecture import Architecture, Scope, Source, WeightRule
from pipeline.models.decoder import Decoder, MlpForm
from pipeline.models.decoder_sizes import attention_windows, decoder_sizes
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
)
from pipeline.models.shape import ModelShape
from pipeline.parallel import Axis

_NAME = "MixtralForCausalLM"
_MOE = f"{HF_LAYER}.block_sparse_moe"
_EXPERT = f"{_MOE}.experts.{{expert}}"

_EXPERT_LINEARS = 3  # w1, w2, w3
# Keeps a corrupt config from planning for ever; each limit alone allows 2**24 experts.
_MAX_EXPERT_WEIGHTS = 2**17

_RULES = (
    embedding(),
    *INPUT_NORM,
    *llama_attention(),
    *POST_NORM,
    WeightRule(
        f"{LAYER}.mlp.router",
        (Source(f"{_MOE}.gate", (Axis.EXPERT, Axis.HIDDEN)),),
        Scope.LAYER,
        dtype="F32",
    ),
    WeightRule(
        f"{LAYER}.mlp.fc",
        (
            Source(f"{_EXPERT}.w3", (Axis.EXPERT_FFN, Axis.HIDDEN)),
            Source(f"{_EXPERT}.w1", (Axis.EXPERT_FFN, Axis.HIDDEN)),
        ),
        Scope.LAYER,
        quantized=True,
        experts=True,
    ),
    WeightRule(
        f"{LAYER}.mlp.proj",
        (Source(f"{_EXPERT}.w2", (Axis.HIDDEN, Axis.EXPERT_FFN)),),
        Scope.LAYER,
        quantized=True,
        experts=True,
    ),
    *FINAL_NORM,
    head(),
)


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    fields = HfFields(config)
    # What transformers' MixtralConfig assumes without the fields.
    sizes = decoder_sizes(fields, default_num_kv_heads=8)
    rotary_base, rotary_scaling = rotary_from_hf(fields, default_base=1e6)
    num_experts = fields.size("num_local_experts", 8, limit=4096)
    experts_per_token = fields.size("num_experts_per_tok", 2)
    if experts_per_token > num_experts:
        what = f"{experts_per_token} of {num_experts} experts"
        fields.refuse("num_experts_per_tok", what, f"1 to {num_experts}")
    num_weights = sizes["num_layers"] * num_experts * _EXPERT_LINEARS
    if num_weights > _MAX_EXPERT_WEIGHTS:
        what = f"{num_experts} in {sizes['num_layers']} layers are {num_weights} expert weights"
        fields.refuse("num_local_experts", what, f"at most {_MAX_EXPERT_WEIGHTS} expert weights")
    fields.only("hidden_act", "silu", "silu", "the network computes SiLU")
    shape = ModelShape(
        architecture=_NAME,
        **sizes,
        norm_epsilon=fields.positive("rms_norm_eps", 1e-5),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        hidden_act="swiglu",
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        attention_bias=False,
        mlp_bias=False,
        attention_windows=attention_windows(fields, sizes["max_position_embeddings"]),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        config_fields={"attn_bias": False, "mlp_bias": False},
    )
    fields.finish()
    return shape


_DECODER = Decoder(
    mlp_form=MlpForm.FUSED, experts=True, qkv_bias=False, dense_bias=False, mlp_bias=False
)

MIXTRAL = Architecture(
    name=_NAME, rules=_RULES, decoder=_DECODER, shape_from_hf=_shape_from_hf, formats=EVERY_FORMAT
)
