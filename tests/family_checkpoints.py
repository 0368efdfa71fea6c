"""A random transformers model in float32, and the same model as a TensorRT-LLM rank checkpoint.

The mapping is written by hand for these tests, after TensorRT-LLM's naming: neither our tables nor
ModelOpt's exporter have a part in it, so both can be compared with it.

Every value is one that the checkpoint can hold, so the model and the checkpoint are equal, not close:
parameters are rounded to multiples of 2^-10 or to float16; with `group_size`, weights of linears are
q * scale * prequant of int4 q, float16 scales and pre-quant scales that are powers of two.
Shapes: N output features, K input features, G groups, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.rank_checkpoints import write_rank

Floats = npt.NDArray[np.float32]

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 331,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(architecture: str, *, group_size: int | None = None, **overrides: Any) -> Any:
    """A model of the Hugging Face class `architecture`, sizes SMALL, `overrides` as config fields."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    fields = dict(SMALL)
    if architecture == "GPT2LMHeadModel":
        fields["n_inner"] = fields.pop("intermediate_size")
    config = model_class.config_class(**{**fields, **overrides})
    model = model_class._from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                is_shift = name.endswith("bias") or architecture.startswith("Gemma")
                low, high = (-0.5, 0.5) if is_shift else (0.5, 1.5)
                parameter.uniform_(low, high).mul_(1024).round_().div_(1024)
            else:
                std = parameter.shape[-1] ** -0.5
                parameter.normal_(std=std).copy_(parameter.half().float())
        if group_size is not None:
            for name, module in model.named_modules():
                if _is_quantized(name, module):
                    transposed = type(module).__name__ == "Conv1D"
                    weight = module.weight.T if transposed else module.weight
                    exact = torch.from_numpy(_dequantized(weight.numpy(), group_size))
                    module.weight.copy_(exact.T if transposed else exact)
    return model


def write_checkpoint(model: Any, out_dir: Path, *, group_size: int | None = None) -> Path:
    """The model as rank 0 of 1."""
    architecture = type(model).__name__
    config = model.config
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    writer = _Writer(weights, group_size)
    extra = _FAMILIES[architecture](writer, config)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "dtype": "float16",
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_size": config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        **extra,
    }
    if group_size is not None:
        fields["quantization"] = {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": None,
            "group_size": group_size,
            "has_zero_point": False,
            "pre_quant_scale": True,
            "exclude_modules": ["lm_head", "*router"],
        }
    write_rank(out_dir, writer.tensors, fields)
    return out_dir


class _Writer:
    """Collects tensors under their TensorRT-LLM names."""

    def __init__(self, weights: dict[str, Floats], group_size: int | None) -> None:
        self.weights = weights
        self.group_size = group_size
        self.tensors: dict[str, npt.NDArray[Any]] = {}

    def plain(self, target: str, value: Floats, dtype: str = "float16") -> None:
        stored = np.ascontiguousarray(value.astype(dtype))
        assert np.array_equal(stored.astype(np.float32), value), target
        self.tensors[target] = stored

    def norm(self, target: str, source: str, plus: float = 0.0) -> None:
        self.plain(f"{target}.weight", self.weights[f"{source}.weight"] + np.float32(plus))
        if f"{source}.bias" in self.weights:
            self.plain(f"{target}.bias", self.weights[f"{source}.bias"])

    def linear(
        self, target: str, sources: list[str], order: Callable[[Floats], Floats] | None = None
    ) -> None:
        """Sources joined along N; `order` rearranges the rows of weight and bias."""
        for tensor in ("weight", "bias"):
            parts = [self.weights.get(f"{source}.{tensor}") for source in sources]
            if parts[0] is None:
                continue
            value = np.concatenate([part for part in parts if part is not None])
            value = value if order is None else order(value)
            if tensor == "bias":
                self.plain(f"{target}.bias", value)
            else:
                self.weight(target, value)

    def weight(self, target: str, value: Floats) -> None:
        """[N, K], or a stack of such."""
        if self.group_size is None:
            self.plain(f"{target}.weight", value)
            return
        stack = value if value.ndim == 3 else value[None]
        encoded = [_int4(matrix, self.group_size) for matrix in stack]
        names = ("weight", "weights_scaling_factor", "prequant_scaling_factor")
        for name, parts in zip(names, zip(*encoded, strict=True), strict=True):
            joined = np.stack(parts)
            self.tensors[f"{target}.{name}"] = joined if value.ndim == 3 else joined[0].copy()

    def embeddings(self, table: str, final_norm: str, head: str, plus: float = 0.0) -> None:
        self.plain("transformer.vocab_embedding.weight", self.weights[f"{table}.weight"])
        self.norm("transformer.ln_f", final_norm, plus)
        self.plain("lm_head.weight", self.weights[f"{head}.weight"])


def _decoder(writer: _Writer, config: Any, plus: float = 0.0, mlp: bool = True) -> dict[str, Any]:
    """What Llama and everything after its fashion have in common."""
    writer.embeddings("model.embed_tokens", "model.norm", "lm_head", plus)
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"transformer.layers.{layer}"
        writer.norm(f"{target}.input_layernorm", f"{source}.input_layernorm", plus)
        writer.norm(f"{target}.post_layernorm", f"{source}.post_attention_layernorm", plus)
        attention = f"{source}.self_attn"
        if f"{attention}.q_proj.weight" in writer.weights:
            qkv = [f"{attention}.{part}_proj" for part in "qkv"]
            writer.linear(f"{target}.attention.qkv", qkv)
        writer.linear(f"{target}.attention.dense", [f"{attention}.o_proj"])
        if mlp:
            writer.linear(f"{target}.mlp.fc", [f"{source}.mlp.gate_proj"])
            writer.linear(f"{target}.mlp.gate", [f"{source}.mlp.up_proj"])
            writer.linear(f"{target}.mlp.proj", [f"{source}.mlp.down_proj"])
    fields = {
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": getattr(config, "hidden_act", "silu"),
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rope_theta,
        "rotary_scaling": getattr(config, "rope_scaling", None),
        "attn_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
    }
    if getattr(config, "head_dim", None):
        fields["head_size"] = config.head_dim
    if getattr(config, "sliding_window", None):
        fields["runtime_defaults"] = {"max_attention_window": [config.sliding_window]}
    return fields


def _qwen2(writer: _Writer, config: Any) -> dict[str, Any]:
    return {**_decoder(writer, config), "attn_bias": True, "qwen_type": "qwen2"}


def _qwen3(writer: _Writer, config: Any) -> dict[str, Any]:
    for layer in range(config.num_hidden_layers):
        for part in "qk":
            writer.norm(
                f"transformer.layers.{layer}.attention.{part}_layernorm",
                f"model.layers.{layer}.self_attn.{part}_norm",
            )
    return {**_decoder(writer, config), "qk_layernorm": True, "qwen_type": "qwen3"}


def _phi3(writer: _Writer, config: Any) -> dict[str, Any]:
    """The halves of gate_up_proj change places: TensorRT-LLM activates the second one."""
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"transformer.layers.{layer}"
        writer.linear(f"{target}.attention.qkv", [f"{source}.self_attn.qkv_proj"])
        writer.linear(
            f"{target}.mlp.fc",
            [f"{source}.mlp.gate_up_proj"],
            lambda rows: np.concatenate(np.split(rows, 2)[::-1]),
        )
        writer.linear(f"{target}.mlp.proj", [f"{source}.mlp.down_proj"])
    fields = _decoder(writer, config, mlp=False)
    fields |= {"hidden_act": "swiglu", "rotary_pct": config.partial_rotary_factor}
    scaling = fields.pop("rotary_scaling")
    if scaling is not None:
        fields["position_embedding_type"] = "long_rope"
        fields["original_max_position_embeddings"] = config.original_max_position_embeddings
        fields["longrope_scaling_short_factors"] = scaling["short_factor"]
        fields["longrope_scaling_long_factors"] = scaling["long_factor"]
    return fields


def _gemma(writer: _Writer, config: Any) -> dict[str, Any]:
    fields = _decoder(writer, config, plus=1.0)
    del writer.tensors["lm_head.weight"]
    return {**fields, "share_embedding_table": True}


def _gemma2(writer: _Writer, config: Any) -> dict[str, Any]:
    for layer in range(config.num_hidden_layers):
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            source, target = f"model.layers.{layer}.{name}", f"transformer.layers.{layer}.{name}"
            writer.norm(target, source, plus=1.0)
    windows = [config.sliding_window, config.max_position_embeddings]
    return {
        **_gemma(writer, config),
        "hidden_act": config.hidden_activation,
        "inter_layernorms": True,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "runtime_defaults": {"max_attention_window": windows},
    }


def _gpt2(writer: _Writer, config: Any) -> dict[str, Any]:
    """Conv1D weights are [K, N]."""
    writer.embeddings("transformer.wte", "transformer.ln_f", "lm_head")
    writer.plain("transformer.position_embedding.weight", writer.weights["transformer.wpe.weight"])
    parts = {
        "attention.qkv": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "mlp.fc": "mlp.c_fc",
        "mlp.proj": "mlp.c_proj",
    }
    for layer in range(config.n_layer):
        source, target = f"transformer.h.{layer}", f"transformer.layers.{layer}"
        writer.norm(f"{target}.input_layernorm", f"{source}.ln_1")
        writer.norm(f"{target}.post_layernorm", f"{source}.ln_2")
        for ours, theirs in parts.items():
            writer.weight(f"{target}.{ours}", writer.weights[f"{source}.{theirs}.weight"].T)
            writer.plain(f"{target}.{ours}.bias", writer.weights[f"{source}.{theirs}.bias"])
    return {
        "intermediate_size": config.n_inner,
        "hidden_act": config.activation_function,
        "norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "learned_absolute",
        "bias": True,
    }


def _gpt_neox(writer: _Writer, config: Any) -> dict[str, Any]:
    writer.embeddings("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
    heads = config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        source, target = f"gpt_neox.layers.{layer}", f"transformer.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.norm(f"{target}.{norm}", f"{source}.{norm}")
        writer.linear(
            f"{target}.attention.qkv",
            [f"{source}.attention.query_key_value"],
            lambda rows: _by_part(rows, heads, 1),
        )
        writer.linear(f"{target}.attention.dense", [f"{source}.attention.dense"])
        writer.linear(f"{target}.mlp.fc", [f"{source}.mlp.dense_h_to_4h"])
        writer.linear(f"{target}.mlp.proj", [f"{source}.mlp.dense_4h_to_h"])
    return {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "norm_epsilon": config.layer_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_pct": config.rotary_pct,
        "rotary_base": config.rotary_emb_base,
    }


def _falcon(writer: _Writer, config: Any) -> dict[str, Any]:
    writer.embeddings("transformer.word_embeddings", "transformer.ln_f", "lm_head")
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    else:
        kv_heads = 1 if config.multi_query else heads
    norms = {
        "input_layernorm": "input_layernorm",
        "ln_attn": "input_layernorm",
        "ln_mlp": "mlp_layernorm",
        "post_attention_layernorm": "post_layernorm",
    }
    for layer in range(config.num_hidden_layers):
        source, target = f"transformer.h.{layer}", f"transformer.layers.{layer}"
        for theirs, ours in norms.items():
            if f"{source}.{theirs}.weight" in writer.weights:
                writer.norm(f"{target}.{ours}", f"{source}.{theirs}")
        writer.linear(
            f"{target}.attention.qkv",
            [f"{source}.self_attention.query_key_value"],
            lambda rows: _by_part(rows, kv_heads, heads // kv_heads),
        )
        writer.linear(f"{target}.attention.dense", [f"{source}.self_attention.dense"])
        writer.linear(f"{target}.mlp.fc", [f"{source}.mlp.dense_h_to_4h"])
        writer.linear(f"{target}.mlp.proj", [f"{source}.mlp.dense_4h_to_h"])
    return {
        "num_key_value_heads": kv_heads,
        "intermediate_size": config.ffn_hidden_size,
        "hidden_act": config.activation,
        "norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config.rope_theta,
        "bias": config.bias,
        "parallel_attention": config.parallel_attn,
        "new_decoder_architecture": config.new_decoder_architecture,
        "num_ln_in_parallel_attn": config.num_ln_in_parallel_attn,
    }


def _mixtral(writer: _Writer, config: Any) -> dict[str, Any]:
    fields = _decoder(writer, config, mlp=False)
    for layer in range(config.num_hidden_layers):
        source = f"model.layers.{layer}.block_sparse_moe"
        target = f"transformer.layers.{layer}.mlp"
        writer.plain(f"{target}.router.weight", writer.weights[f"{source}.gate.weight"], "float32")
        w1, w2, w3 = (
            np.stack(
                [
                    writer.weights[f"{source}.experts.{expert}.{part}.weight"]
                    for expert in range(config.num_local_experts)
                ]
            )
            for part in ("w1", "w2", "w3")
        )
        writer.weight(f"{target}.fc", np.concatenate([w3, w1], axis=1))
        writer.weight(f"{target}.proj", w2)
    moe = {
        "num_experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "normalization_mode": 1,
    }
    return {**fields, "hidden_act": "swiglu", "moe": moe}


_FAMILIES: dict[str, Callable[[_Writer, Any], dict[str, Any]]] = {
    "LlamaForCausalLM": _decoder,
    "MistralForCausalLM": _decoder,
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


def _by_part(rows: Floats, num_groups: int, queries: int) -> Floats:
    """[group: queries, key, value] for each group -> [all queries | all keys | all values]."""
    tail = rows.shape[1:]
    grouped = rows.reshape(num_groups, queries + 2, -1, *tail)
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return np.concatenate([part.reshape(-1, *tail) for part in parts])


def _is_quantized(name: str, module: Any) -> bool:
    excluded = ("lm_head", "embed_out", "block_sparse_moe.gate")
    return type(module).__name__ in ("Linear", "Conv1D", "FalconLinear") and not name.endswith(
        excluded
    )


def _prequant(num_inputs: int) -> Floats:
    return np.resize(np.array([1.0, 0.5, 2.0, 1.0, 4.0], np.float32), num_inputs)


def _quantized(weight_NK: Floats, group_size: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """q [N, K] in -7..7 and scale [N, G], of the weight without its pre-quant scale."""
    num_outputs, num_inputs = weight_NK.shape
    groups = (weight_NK / _prequant(num_inputs)).reshape(num_outputs, -1, group_size)
    scale = (np.abs(groups).max(-1) / 7).astype(np.float16).astype(np.float32)
    return np.round(groups / scale[..., None]).astype(np.int8).reshape(weight_NK.shape), scale


def _dequantized(weight_NK: Floats, group_size: int) -> Floats:
    values, scale = _quantized(weight_NK, group_size)
    exact = values * np.repeat(scale, group_size, axis=1) * _prequant(weight_NK.shape[1])
    return exact.astype(np.float32)


def _int4(weight_NK: Floats, group_size: int) -> tuple[npt.NDArray[Any], ...]:
    """(packed int8 [N/2, K], scale float32 [N, G], prequant float16 [K]) of an exact weight."""
    values, scale = _quantized(weight_NK, group_size)
    assert np.array_equal(_dequantized(weight_NK, group_size), weight_NK)
    unsigned = values.view(np.uint8) & 15
    packed = (unsigned[0::2] | (unsigned[1::2] << 4)).view(np.int8)
    return packed, scale, _prequant(weight_NK.shape[1]).astype(np.float16)
