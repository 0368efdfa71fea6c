"""Tiny random checkpoints of every architecture, written by transformers itself (not by our tables)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DECODER: dict[str, Any] = {
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

TINY: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_DECODER, "attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {**_DECODER, "head_dim": 24, "sliding_window": 16},
    "Qwen2ForCausalLM": _DECODER,
    "Qwen3ForCausalLM": {**_DECODER, "head_dim": 24},
    "Phi3ForCausalLM": {
        **_DECODER,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.05 * index for index in range(6)],
            "long_factor": [1.5 + 0.5 * index for index in range(6)],
        },
    },
    "GemmaForCausalLM": {**_DECODER, "head_dim": 24, "tie_word_embeddings": True},
    "Gemma2ForCausalLM": {
        **_DECODER,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 25.0,
        "attn_logit_softcapping": 45.0,
    },
    "GPT2LMHeadModel": {
        "n_embd": 96,
        "n_inner": 160,
        "n_layer": 3,
        "n_head": 6,
        "vocab_size": 331,
        "n_positions": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "GPTNeoXForCausalLM": {
        **{name: value for name, value in _DECODER.items() if name != "num_key_value_heads"},
        "rotary_pct": 0.25,
        "rotary_emb_base": 5000,
    },
    "FalconForCausalLM": {
        **_DECODER,
        "ffn_hidden_size": 160,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "bias": True,
    },
    "MixtralForCausalLM": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Config fields of one small model for each architecture; the class of the config is found by name."""

_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
ALWAYS_TIED = ("GemmaForCausalLM", "Gemma2ForCausalLM")


def write_tiny(
    architecture: str,
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float16",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A random model of the Hugging Face class `architecture`; `overrides` are config fields.

    Every parameter is random: norms are not all ones, biases not zero, so that a swapped or forgotten
    one shows. Weights are large enough for logits that differ clearly between tokens.
    """
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    torch.manual_seed(seed)
    config = model_class.config_class(**_fields(architecture, overrides))
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            elif name.endswith("bias") or architecture.startswith("Gemma"):
                parameter.uniform_(-0.5, 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.config.architectures = [architecture]
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def _fields(architecture: str, overrides: dict[str, Any]) -> dict[str, Any]:
    fields = {**TINY[architecture], **overrides}
    if architecture == "GPT2LMHeadModel":
        return {_GPT2_NAMES.get(name, name): value for name, value in fields.items()}
    return fields


def tiny_config(architecture: str, **overrides: Any) -> dict[str, Any]:
    """The config.json of such a model, without making one."""
    import transformers

    config_class = getattr(transformers, architecture).config_class
    config = config_class(architectures=[architecture], **_fields(architecture, overrides))
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields
