"""Tiny random checkpoints in Hugging Face layout, written by transformers itself (not by our tables)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float16",
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """A random Llama: hidden 128, 2 layers, 4 heads, 2 KV heads, FFN 256, vocabulary 512.

    `overrides` are LlamaConfig fields. Weights are scaled up from the default initialisation so that
    logits differ clearly between tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields.update(overrides)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
            else:  # norms: not all ones, so that a swapped or forgotten norm shows
                parameter.uniform_(0.5, 1.5)
    model.config.architectures = ["LlamaForCausalLM"]
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
