"""What the architecture's name in a TensorRT-LLM config.json implies, as features of the network.

The only place of this package that knows names of architectures. One more: one function and one line
in `FAMILIES`, and a feature where none of the existing ones says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from pipeline.network.config_fields import ConfigFields, is_size
from pipeline.network.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rotary,
    Scaling,
)
from pipeline.network.spec import (
    PRE_NORM,
    Activation,
    Biases,
    Experts,
    Features,
    MlpForm,
    Norm,
    Residual,
)

_SANDWICH = Residual(
    parallel=False,
    before_attention="input_layernorm",
    after_attention="post_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_PARALLEL_TWO_NORMS = Residual(True, "input_layernorm", "post_attention_layernorm")
_PARALLEL_TWO_NORMS_NAMED_MLP = Residual(True, "input_layernorm", "mlp_layernorm")
_PARALLEL_ONE_NORM = Residual(True, "input_layernorm", "input_layernorm")

# Names as transformers 4.57 computes them, the judge of `verify`; so "gelu" is erf, in Gemma too, though
# Gemma was trained by the tanh formula. TensorRT-LLM itself computes "gelu" by the tanh formula.
_SILU = {"silu": Activation.SILU, "swiglu": Activation.SILU}
_TANH = {
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
}
_GELU = {"gelu": Activation.GELU, **_TANH}

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
    name = fields.get("architecture")
    if name not in FAMILIES:
        what = "architecture is missing" if name is None else f"architecture is {name!r}"
        fields.refuse(what, ", ".join(FAMILIES))
        return Features()
    return FAMILIES[name](fields, head_size)


def _llama(fields: ConfigFields, head_size: int) -> Features:
    attention = fields.flag("attn_bias")
    return Features(
        activation=_activation(fields, _SILU),
        biases=Biases(attention, attention, fields.flag("mlp_bias")),
        qk_norm=_qk_norm(fields, allowed=(False,)),
        rotary=_rotary(fields, head_size),
        windows=_windows(fields),
    )


def _mixtral(fields: ConfigFields, head_size: int) -> Features:
    moe = fields.section("moe")
    experts = Experts(moe.size("num_experts"), moe.size("top_k"))
    if experts.top_k > experts.num_experts:
        moe.refuse(f"top_k is {experts.top_k}", f"1 to num_experts {experts.num_experts}")
    moe.only("normalization_mode", (1,))
    moe.only("shared_expert_intermediate_size", (0,))
    return Features(
        mlp_form=MlpForm.FUSED,
        activation=_activation(fields, _SILU),
        experts=experts,
        rotary=_rotary(fields, head_size),
        windows=_windows(fields),
    )


def _qwen2(fields: ConfigFields, head_size: int) -> Features:
    return Features(
        activation=_activation(fields, _SILU),
        biases=Biases(qkv=fields.flag("attn_bias", default=True), mlp=fields.flag("mlp_bias")),
        rotary=_rotary(fields, head_size),
        windows=_windows(fields),
    )


def _qwen3(fields: ConfigFields, head_size: int) -> Features:
    attention = fields.flag("attn_bias")
    return Features(
        activation=_activation(fields, _SILU),
        biases=Biases(attention, attention, fields.flag("mlp_bias")),
        qk_norm=_qk_norm(fields, allowed=(True,)),
        rotary=_rotary(fields, head_size),
        windows=_windows(fields),
    )


def _phi3(fields: ConfigFields, head_size: int) -> Features:
    return Features(
        mlp_form=MlpForm.FUSED,
        activation=_activation(fields, _SILU),
        rotary=_rotary(fields, head_size, ("rope_gpt_neox", "long_rope")),
        windows=_windows(fields),
    )


def _gemma(fields: ConfigFields, head_size: int) -> Features:
    attention = fields.flag("attn_bias")
    return Features(
        activation=_activation(fields, _GELU),
        biases=Biases(attention, attention, fields.flag("mlp_bias")),
        rotary=_rotary(fields, head_size),
        embedding_scale=math.sqrt(fields.size("hidden_size")),
    )


def _gemma2(fields: ConfigFields, head_size: int) -> Features:
    attention = fields.flag("attn_bias")
    return Features(
        residual=_SANDWICH,
        activation=_activation(fields, _GELU),
        biases=Biases(attention, attention, fields.flag("mlp_bias")),
        rotary=_rotary(fields, head_size),
        embedding_scale=math.sqrt(fields.size("hidden_size")),
        query_scale=fields.number("query_pre_attn_scalar", head_size) ** -0.5,
        attention_softcap=fields.number_or_none("attn_logit_softcapping"),
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
        windows=_windows(fields),
    )


def _gpt2(fields: ConfigFields, head_size: int) -> Features:
    fields.only("position_embedding_type", ("learned_absolute",))
    bias = fields.flag("bias", default=True)
    return Features(
        norm=Norm.LAYER,
        mlp_form=MlpForm.PLAIN,
        activation=_activation(fields, _GELU),
        biases=Biases(bias, bias, bias),
        learned_positions=True,
    )


def _gpt_neox(fields: ConfigFields, head_size: int) -> Features:
    return Features(
        norm=Norm.LAYER,
        residual=_PARALLEL_TWO_NORMS,
        mlp_form=MlpForm.PLAIN,
        activation=_activation(fields, _GELU),
        biases=Biases(qkv=True, dense=True, mlp=True),
        rotary=_rotary(fields, head_size),
    )


def _falcon(fields: ConfigFields, head_size: int) -> Features:
    bias = fields.flag("bias")
    return Features(
        norm=Norm.LAYER,
        residual=_falcon_residual(fields),
        mlp_form=MlpForm.PLAIN,
        activation=_activation(fields, _GELU),
        biases=Biases(bias, bias, bias),
        rotary=_rotary(fields, head_size),
    )


def _falcon_residual(fields: ConfigFields) -> Residual:
    """The new decoder is always parallel, with two norms unless num_ln_in_parallel_attn says one."""
    new_decoder = fields.flag("new_decoder_architecture")
    num_norms = fields.choice(
        "num_ln_in_parallel_attn", {None: None, 1: 1, 2: 2}, 2 if new_decoder else None
    )
    if new_decoder:
        return _PARALLEL_ONE_NORM if num_norms == 1 else _PARALLEL_TWO_NORMS_NAMED_MLP
    return _PARALLEL_ONE_NORM if fields.flag("parallel_attention") else PRE_NORM


FAMILIES: Mapping[str, Callable[[ConfigFields, int], Features]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "FalconForCausalLM": _falcon,
}


def _activation(fields: ConfigFields, allowed: Mapping[str, Activation]) -> Activation:
    if fields.get("hidden_act") is None:
        fields.refuse("hidden_act is missing", ", ".join(allowed))
        return next(iter(allowed.values()))
    return fields.choice("hidden_act", allowed, None)


def _qk_norm(fields: ConfigFields, allowed: tuple[bool, ...]) -> bool:
    return fields.choice("qk_layernorm", {value: value for value in allowed}, allowed[0])


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


def _rotary(
    fields: ConfigFields, head_size: int, kinds: tuple[str, ...] = ("rope_gpt_neox",)
) -> Rotary:
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
