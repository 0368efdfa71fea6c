"""config.json of the architectures beside Llama: published ones, and what is refused, with its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint import mapping_problems
from pipeline.checkpoint.synthetic import write_synthetic
from pipeline.checkpoint.trtllm_config import trtllm_config
from pipeline.errors import CheckpointError
from pipeline.models import ModelShape, shape_from_hf
from pipeline.parallel import Axis
from pipeline.progress import SilentProgress
from pipeline.quant.formats import FORMATS
from tests.tiny_models import TINY, tiny_config

# As on the Hub, without the fields that say nothing about the network.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-7b-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "phi-3-mini-128k": {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0 + index for index in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "pythia-2.8b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": "gelu",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "falcon-7b": {
        "alibi": False,
        "architectures": ["FalconForCausalLM"],
        "bias": False,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "falcon-40b": {
        "alibi": False,
        "architectures": ["FalconForCausalLM"],
        "bias": False,
        "hidden_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
}
# (heads, KV heads, head size, FFN, tied), then fields of our config.json.
EXPECTED: dict[str, tuple[tuple[int, int, int, int, bool], dict[str, Any]]] = {
    "mistral-7b-v0.1": (
        (32, 8, 128, 14336, False),
        {"runtime_defaults": {"max_attention_window": [4096]}, "hidden_act": "silu"},
    ),
    "qwen2.5-0.5b": ((14, 2, 64, 4864, True), {"attn_bias": True, "qwen_type": "qwen2"}),
    "qwen3-0.6b": ((16, 8, 128, 3072, True), {"attn_bias": False, "qk_layernorm": True}),
    "phi-3-mini-128k": (
        (32, 32, 96, 8192, False),
        {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": 4096,
            "longrope_scaling_short_factors": [1.0] * 48,
            "rotary_scaling": None,
        },
    ),
    "gemma-2b": (
        (8, 1, 256, 16384, True),
        {"share_embedding_table": True, "hidden_act": "gelu", "inter_layernorms": None},
    ),
    "gemma-2-9b": (
        (16, 8, 256, 14336, True),
        {
            "query_pre_attn_scalar": 256.0,
            "runtime_defaults": {"max_attention_window": [4096, 8192]},
        },
    ),
    "gpt2": (
        (12, 12, 64, 3072, True),
        {"position_embedding_type": "learned_absolute", "max_position_embeddings": 1024},
    ),
    "pythia-2.8b": (
        (32, 32, 80, 10240, False),
        {"rotary_pct": 0.25, "rotary_base": 10000.0, "rotary_emb_base": 10000.0},
    ),
    "falcon-7b": (
        (71, 1, 64, 18176, True),
        {"num_ln_in_parallel_attn": None, "parallel_attention": True},
    ),
    "falcon-40b": (
        (128, 8, 64, 32768, True),
        {"num_ln_in_parallel_attn": 2, "new_decoder_architecture": True},
    ),
    "mixtral-8x7b": (
        (32, 8, 128, 14336, False),
        {
            "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 1},
            "rotary_base": 1e6,
            "hidden_act": "swiglu",
        },
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs(model: str) -> None:
    shape = shape_from_hf(PUBLISHED[model])
    sizes, fields = EXPECTED[model]
    found = (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.intermediate_size)
    assert (*found, shape.tie_word_embeddings) == sizes
    config = trtllm_config(shape, FORMATS["fp16"], tp=1, pp=1)
    assert {name: config.get(name) for name in fields} == fields
    assert config["architecture"] == PUBLISHED[model]["architectures"][0]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("mistral-7b-v0.1", {"sliding_window": 0}, "sliding_window: 0; allowed: an integer from 1"),
    (
        "qwen2.5-0.5b",
        {"use_sliding_window": True},
        "use_sliding_window: True is not supported: every layer sees the whole context",
    ),
    ("qwen3-0.6b", {"attention_bias": True}, "attention_bias: True is not supported"),
    (
        "phi-3-mini-128k",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.type: linear is not supported; allowed: longrope",
    ),
    (
        "phi-3-mini-128k",
        {
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0] * 47,
                "long_factor": [1.0] * 48,
            }
        },
        "rope_scaling.short_factor: 47 values; allowed: 48 numbers above 0",
    ),
    (
        "phi-3-mini-128k",
        {"partial_rotary_factor": 0.01, "rope_scaling": None},
        "partial_rotary_factor: 0.01 rotates 0 of 96 channels; allowed: an even number, at most all",
    ),
    (
        "phi-3-mini-128k",
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_parameters: {'rope_type': 'longrope'} is not supported: save the model with transf",
    ),
    ("gemma-2b", {"tie_word_embeddings": False}, "tie_word_embeddings: False is not supported"),
    ("gemma-2b", {"hidden_act": "silu"}, "hidden_act: 'silu' is not supported; allowed: gelu_py"),
    (
        "gemma-2-9b",
        {"layer_types": ["full_attention"]},
        "layer_types: 1 entries; allowed: 42 of sliding_attention, full_attention",
    ),
    ("gemma-2-9b", {"attn_logit_softcapping": -1}, "attn_logit_softcapping: -1; allowed: a number"),
    ("gpt2", {"n_head": 7}, "n_head: 7 does not divide n_embd 768"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False is not supported"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function: 'tanh' is not supported"),
    (
        "pythia-2.8b",
        {"use_parallel_residual": False},
        "use_parallel_residual: False is not supported: attention and MLP must be in parallel",
    ),
    ("pythia-2.8b", {"rotary_pct": 1.5}, "rotary_pct: 1.5 rotates 120 of 80 channels"),
    ("pythia-2.8b", {"attention_bias": False}, "attention_bias: False is not supported"),
    ("pythia-2.8b", {"head_dim": 64}, "head_dim: 64 is not supported: transformers rotates by it"),
    (
        "pythia-2.8b",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        "rope_parameters.partial_rotary_factor: 1.0 is not supported: 0.25 of the channels of a head",
    ),
    ("falcon-7b", {"head_dim": 64}, "head_dim: 64 is not supported: a head has hidden_size"),
    *(
        (
            model,
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor: 0.5 is not supported: every channel of a head is rotated",
        )
        for model in (
            *("mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2b"),
            *("gemma-2-9b", "falcon-7b", "mixtral-8x7b"),
        )
    ),
    ("falcon-7b", {"alibi": True}, "alibi: True is not supported: positions must be rotary"),
    (
        "falcon-40b",
        {"parallel_attn": False},
        "parallel_attn: False is not supported: the new decoder is parallel",
    ),
    ("falcon-40b", {"num_kv_heads": 7}, "num_kv_heads: 7 does not divide 128 attention heads"),
    ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn: 3; allowed: an int"),
    (
        "falcon-7b",
        {"multi_query": False, "num_kv_heads": 1},
        "num_kv_heads: 1 is not supported: every head has its own k and v; allowed: 71",
    ),
    ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu' is not supported"),
    (
        "gemma-2b",
        {"hidden_activation": "gelu_pytorch_tanh"},
        "hidden_activation: 'gelu_pytorch_tanh' contradicts hidden_act 'gelu'",
    ),
    (
        "pythia-2.8b",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling: linear is not supported: TensorRT-LLM's model of this family ignores it",
    ),
    (
        "falcon-7b",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling: dynamic is not supported: TensorRT-LLM's model of this family ignores it",
    ),
    (
        "mixtral-8x7b",
        {"num_local_experts": 4096, "num_hidden_layers": 4096},
        "num_local_experts: 4096 in 4096 layers are 50331648 expert weights; allowed: at most 131072",
    ),
    (
        "pythia-2.8b",
        {"rotary_pct": 1e308},
        "rotary_pct: 1e+308; allowed: a number above 0, at most",
    ),
    ("phi-3-mini-128k", {"partial_rotary_factor": 1e308}, "partial_rotary_factor: 1e+308; allowed"),
    ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8 experts; allowed: 1"),
]


@pytest.mark.parametrize(("model", "changes", "text"), BAD)
def test_refused(model: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_hf({**PUBLISHED[model], **changes})
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"config.json: {text}")


def _mixtral() -> ModelShape:
    return shape_from_hf(PUBLISHED["mixtral-8x7b"])


@pytest.mark.parametrize(
    ("model", "tp", "moe_ep", "texts"),
    [
        ("mixtral-8x7b", 8, 1, []),
        ("mixtral-8x7b", 8, 8, []),
        (
            "mixtral-8x7b",
            4,
            3,
            [
                "moe_ep=3: 8 experts on tp=4 ranks cannot be shared out in 3 blocks; "
                "allowed: moe_ep 1, 2, 4"
            ],
        ),
        (
            "mistral-7b-v0.1",
            2,
            2,
            ["moe_ep=2: the model has no experts; allowed: moe_ep 1"],
        ),
        (
            "falcon-7b",
            2,
            1,
            [
                "tp=2: num_attention_heads 71 cannot be shared out evenly over tp=2; allowed: tp 1",
            ],
        ),
        (
            "qwen2.5-0.5b",
            4,
            1,
            [
                "tp=4: num_attention_heads 14 cannot be shared out evenly over tp=4; "
                "allowed: tp 1, 2"
            ],
        ),
    ],
)
def test_legal_mappings(model: str, tp: int, moe_ep: int, texts: list[str]) -> None:
    problems = mapping_problems(shape_from_hf(PUBLISHED[model]), FORMATS["fp16"], tp, 1, moe_ep)
    assert len(problems) == len(texts)
    for problem, text in zip(problems, texts, strict=True):
        assert str(problem).startswith(text)


def test_every_axis_has_a_size() -> None:
    shape = _mixtral()
    assert {axis: shape.extent(axis).size for axis in Axis} == {
        Axis.HIDDEN: 4096,
        Axis.Q: 4096,
        Axis.KV: 1024,
        Axis.FFN: 14336,
        Axis.VOCAB: 32000,
        Axis.HEAD: 128,
        Axis.POSITION: 32768,
        Axis.EXPERT: 8,
        Axis.EXPERT_FFN: 14336,
    }


@pytest.mark.parametrize("architecture", TINY)
def test_synthetic_weights_load_in_transformers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    write_synthetic(config, tmp_path, seed=0, progress=SilentProgress())
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    for name, values in load_file(tmp_path / "model.safetensors").items():
        if values.ndim > 1:
            continue
        around_one = not name.endswith(".bias") and not architecture.startswith("Gemma")
        assert abs(np.median(values.astype(np.float32)) - around_one) < 0.1, name
