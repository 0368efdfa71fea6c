"""Features of the network from a TensorRT-LLM config.json and what its architecture declares.

Knows no architecture by name: `Architecture.decoder` says what a name implies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.models import ARCHITECTURES
from pipeline.models.decoder import LEARNED, Activation, Decoder, Flag, Residual
from pipeline.network.config_fields import ConfigFields, is_size
from pipeline.network.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rotary,
    Scaling,
)
from pipeline.network.spec import Biases, Experts, Features

# Options of TensorRT-LLM that would change the computation; absent means the first.
_NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "residual_mlp": (False,),
    "q_scaling": (1.0,),
    "inner_layernorm": (False,),
    "norm_before_bmm1": (False,),
    "apply_query_key_layer_scaling": (False,),
    "use_logn_attn": (False,),
    "use_parallel_residual": (True,),
}


def read_features(fields: ConfigFields, head_size: int) -> Features:
    """Features of the config's architecture; problems are left in `fields`."""
    for name, allowed in _NOT_IMPLEMENTED.items():
        fields.only(name, allowed)
    architecture = fields.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        shown = "is missing" if architecture is None else f"is {architecture!r}"
        fields.refuse(f"architecture {shown}", ", ".join(ARCHITECTURES))
        return Features()
    decoder = ARCHITECTURES[architecture].decoder
    learned = decoder.positions == LEARNED
    if learned:
        fields.only("position_embedding_type", LEARNED)
    return Features(
        norm=decoder.norm,
        residual=_residual(fields, decoder),
        mlp_form=decoder.mlp_form,
        activation=_activation(fields, decoder.activations),
        experts=_experts(fields) if decoder.experts else None,
        biases=_biases(fields, decoder),
        qk_norm=fields.choice("qk_layernorm", {decoder.qk_norm: decoder.qk_norm}, decoder.qk_norm),
        rotary=None if learned else _rotary(fields, head_size, decoder.positions),
        learned_positions=learned,
        embedding_scale=math.sqrt(fields.size("hidden_size")) if decoder.scaled_embedding else 1.0,
        query_scale=_query_scale(fields, decoder, head_size),
        attention_softcap=_softcap(fields, decoder, "attn_logit_softcapping"),
        logit_softcap=_softcap(fields, decoder, "final_logit_softcapping"),
        windows=_windows(fields) if decoder.windowed else (),
    )


def _residual(fields: ConfigFields, decoder: Decoder) -> Residual:
    if isinstance(decoder.residual, Residual):
        return decoder.residual
    options: dict[str, object] = {
        name: fields.choice(name, {value: value for value in allowed}, allowed[0])
        for name, allowed in decoder.options.items()
    }
    return decoder.residual(options)


def _experts(fields: ConfigFields) -> Experts:
    moe = fields.section("moe")
    experts = Experts(moe.size("num_experts"), moe.size("top_k"))
    if experts.top_k > experts.num_experts:
        moe.refuse(f"top_k is {experts.top_k}", f"1 to num_experts {experts.num_experts}")
    moe.only("normalization_mode", (1,))
    moe.only("shared_expert_intermediate_size", (0,))
    return experts


def _biases(fields: ConfigFields, decoder: Decoder) -> Biases:
    declared = (decoder.qkv_bias, decoder.dense_bias, decoder.mlp_bias)
    # Often one field for all three: it is read, and refused, once.
    values = {flag: _flag(fields, flag) for flag in dict.fromkeys(declared)}
    qkv, dense, mlp = (values[flag] for flag in declared)
    return Biases(qkv, dense, mlp)


def _flag(fields: ConfigFields, flag: Flag | bool) -> bool:
    return flag if isinstance(flag, bool) else fields.flag(flag.field, flag.default)


def _activation(fields: ConfigFields, allowed: Mapping[str, Activation]) -> Activation:
    if fields.get("hidden_act") is None:
        fields.refuse("hidden_act is missing", ", ".join(allowed))
        return next(iter(allowed.values()))
    return fields.choice("hidden_act", allowed, None)


def _query_scale(fields: ConfigFields, decoder: Decoder, head_size: int) -> float | None:
    if not decoder.query_scalar:
        return None
    return math.pow(fields.number(decoder.query_scalar, head_size), -0.5)


def _softcap(fields: ConfigFields, decoder: Decoder, name: str) -> float | None:
    return fields.number_or_none(name) if decoder.softcapped else None


def _windows(fields: ConfigFields) -> tuple[int, ...]:
    """TensorRT-LLM's max_attention_window: sizes that are repeated over the layers."""
    defaults = fields.section("runtime_defaults")
    sizes = defaults.get("max_attention_window")
    if sizes is None:
        return ()
    if not isinstance(sizes, list) or not sizes or not all(map(is_size, sizes)):
        defaults.refuse(f"max_attention_window is {sizes!r}", "integers, 1 or more")
        return ()
    return tuple(sizes)


def _rotary(fields: ConfigFields, head_size: int, kinds: tuple[str, ...]) -> Rotary:
    kind = fields.choice("position_embedding_type", {name: name for name in kinds}, kinds[0])
    fraction = fields.number("rotary_pct", 1.0)
    if fraction > 1:
        fields.refuse(f"rotary_pct is {fraction}", "above 0, at most 1")
        fraction = 1.0
    num_channels = fields.size("rotary_embedding_dim", max(int(head_size * fraction), 1))
    if num_channels % 2 or num_channels > head_size:
        what = f"{num_channels} rotated channels of heads of {head_size}"
        fields.refuse(what, "an even number, at most the head size")
        num_channels = 2
    base = fields.number("rotary_base", 10000.0)
    scaling = _long(fields, num_channels // 2) if kind == "long_rope" else _scaling(fields)
    return Rotary(num_channels, base, scaling)


def _scaling(fields: ConfigFields) -> Scaling | None:
    numbers = fields.section("rotary_scaling")
    kind = numbers.get("rope_type") or numbers.get("type") or "none"
    if kind == "linear":
        return LinearScaling(numbers.number("factor"))
    if kind == "llama3":
        # TensorRT-LLM's reader has these defaults.
        return Llama3Scaling(
            numbers.number("factor", 8.0),
            numbers.number("low_freq_factor", 1.0),
            numbers.number("high_freq_factor", 4.0),
            numbers.number("original_max_position_embeddings", 8192),
        )
    if kind == "dynamic":
        # It only acts beyond max_position_embeddings, and no engine is longer than that.
        numbers.number("factor")
    elif kind not in ("none", "default"):
        fields.refuse(f"rotary_scaling of type {kind!r}", "none, linear, dynamic, llama3")
    return None


def _long(fields: ConfigFields, num_frequencies: int) -> LongScaling:
    original = fields.size("original_max_position_embeddings")
    growth = fields.size("max_position_embeddings") / original
    # transformers' magnitude, where the config does not give one.
    usual = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 < original else 1.0
    return LongScaling(
        fields.numbers("longrope_scaling_short_factors", num_frequencies),
        fields.numbers("longrope_scaling_long_factors", num_frequencies),
        original,
        fields.number("longrope_short_mscale", usual),
        fields.number("longrope_long_mscale", usual),
    )
