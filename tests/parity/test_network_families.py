"""Logits of transformers (float32) against ONNX Runtime on our network, for every family.

The checkpoints are written by hand from the transformers model (tests/family_checkpoints.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.family_checkpoints import random_model, write_checkpoint
from tests.network_logits import (
    engine,
    largest_difference,
    logits_of_tensorrt_graph,
    logits_of_transformers,
    random_ids,
)
from tests.rank_checkpoints import read_rank

# Largest difference seen over all cases below: 5.6e-6, with logits up to 4.5.
TOLERANCE = 1e-4
# The same of the float16 graph: 9.7e-3 (mixtral); all but two cases are below 7e-3.
FLOAT16_TOLERANCE = 0.03

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
}
FALCON = {"num_attention_heads": 5, "hidden_size": 80, "ffn_hidden_size": 176}

# Names say what is unusual; the rest is hidden 96, 3 layers, 6 heads, 2 KV heads, FFN 160.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases-wide-heads": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 3},
    ),
    "llama-dynamic-rope": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "tie_word_embeddings": True},
    ),
    "llama3-seven-heads": (
        "LlamaForCausalLM",
        {
            "hidden_size": 112,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "rope_scaling": LLAMA3,
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied-mha": (
        "Qwen2ForCausalLM",
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_theta": 1e6,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "qwen3-tied": (
        "Qwen3ForCausalLM",
        {"head_dim": 40, "num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3-partial-mha": (
        "Phi3ForCausalLM",
        {"partial_rotary_factor": 0.5, "num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "phi3-longrope-beyond-the-original": (
        "Phi3ForCausalLM",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "phi3-longrope-within-the-original": (
        "Phi3ForCausalLM",
        {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phi3-window": ("Phi3ForCausalLM", {"sliding_window": 5, "num_key_value_heads": 3}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma-one-kv-head": (
        "GemmaForCausalLM",
        {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gemma-exact-gelu": (
        "GemmaForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "gemma2-exact-gelu": (
        "Gemma2ForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "hidden_activation": "gelu"},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 24},
    ),
    "gemma2-window": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "sliding_window": 6,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-three-heads-exact-gelu": (
        "GPT2LMHeadModel",
        {"num_attention_heads": 3, "activation_function": "gelu", "n_inner": 200},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.25, "num_attention_heads": 3}),
    "gpt-neox-full-rotary": (
        "GPTNeoXForCausalLM",
        {"rotary_pct": 1.0, "tie_word_embeddings": True, "rotary_emb_base": 500},
    ),
    "falcon-multi-query": ("FalconForCausalLM", {**FALCON, "tie_word_embeddings": True}),
    "falcon-new-decoder": (
        "FalconForCausalLM",
        {
            **FALCON,
            "hidden_size": 160,
            "num_attention_heads": 10,
            "new_decoder_architecture": True,
            "num_kv_heads": 5,
        },
    ),
    "falcon-new-decoder-one-norm": (
        "FalconForCausalLM",
        {
            **FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 1,
            "num_ln_in_parallel_attn": 1,
            "bias": True,
        },
    ),
    "falcon-sequential-mha": (
        "FalconForCausalLM",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-three-of-five": (
        "MixtralForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 6,
            "head_dim": 24,
            "sliding_window": 9,
        },
    ),
}
# One of each family.
TENSORRT_GRAPHS = (
    "llama-biases-wide-heads",
    "mistral-window",
    "qwen2",
    "qwen3",
    "phi3-partial-mha",
    "gemma",
    "gemma2-window",
    "gpt2",
    "gpt-neox",
    "falcon-multi-query",
    "falcon-new-decoder",
    "mixtral",
)
# Groups of 32 input channels; inputs of every linear are multiples of it.
INT4_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 3},
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt-neox": ("GPTNeoXForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"num_attention_heads": 3, "ffn_hidden_size": 192}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_fp16_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    architecture, overrides = MODELS[name]
    model = random_model(architecture, **overrides)
    network = engine(write_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "engine")
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


@pytest.mark.parametrize("name", INT4_MODELS)
def test_int4_logits_equal_the_dequantized_model(tmp_path: Path, name: str) -> None:
    architecture, overrides = INT4_MODELS[name]
    model = random_model(architecture, group_size=32, **overrides)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint", group_size=32)
    tensors = read_rank(checkpoint)
    assert tensors["transformer.layers.2.attention.dense.weight"].dtype == "int8"
    network = engine(checkpoint, tmp_path / "engine")
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


@pytest.mark.parametrize("name", TENSORRT_GRAPHS)
def test_the_graph_for_tensorrt_means_the_same(tmp_path: Path, name: str) -> None:
    """TensorRT's plan cannot be run without a GPU; what its parser is given can."""
    architecture, overrides = MODELS[name]
    model = random_model(architecture, **overrides)
    engine(write_checkpoint(model, tmp_path / "checkpoint"), tmp_path / "engine")
    ids_BS = random_ids(model.config.vocab_size, 2)
    found_BSV = logits_of_tensorrt_graph(tmp_path / "engine", ids_BS, cut=9)
    difference = np.abs(found_BSV - logits_of_transformers(model, ids_BS)).max()
    assert difference <= FLOAT16_TOLERANCE
