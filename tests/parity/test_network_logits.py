"""Logits of transformers (float32) against ONNX Runtime on our network, from ModelOpt's own exports.

For int4 the transformers model gets the weights that the packed tensors stand for, computed here.
Shapes: B rows, S positions, V vocabulary, N output and K input features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.network_logits import engine, largest_difference
from tests.rank_checkpoints import export_with_modelopt, read_rank
from tests.tiny import write_tiny_llama

# Largest difference seen over all cases below: 5.5e-6, with logits up to 4.2.
TOLERANCE = 1e-4

Floats = npt.NDArray[np.float32]

# Names say what is unusual; the rest is hidden 128, 4 heads, 2 KV heads, FFN 256, vocabulary 512.
FP16_MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "three-heads": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "nine-heads": {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    "tied": {"tie_word_embeddings": True},
    "linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3-rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "rope_theta": 500.0,
    },
    "odd-vocabulary": {"vocab_size": 509},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 48},
}
INT4_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "g128": (128, {"hidden_size": 256, "intermediate_size": 512}),
    "g64": (64, {}),
    "one-group": (128, {"num_key_value_heads": 4}),
}


def _load(source_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FP16_MODELS)
def test_fp16_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    source = write_tiny_llama(tmp_path / "source", **FP16_MODELS[name])
    checkpoint = export_with_modelopt(source, tmp_path / "checkpoint", group_size=None)
    model = _load(source)
    vocab_size = model.config.vocab_size
    network = engine(checkpoint, tmp_path / "engine", vocab_size)
    assert network.shape.vocab_size == vocab_size
    assert largest_difference(model, network, vocab_size) <= TOLERANCE


@pytest.mark.parametrize("name", INT4_MODELS)
def test_int4_logits_equal_the_dequantized_model(tmp_path: Path, name: str) -> None:
    group_size, overrides = INT4_MODELS[name]
    source = write_tiny_llama(tmp_path / "source", vocab_size=500, **overrides)
    checkpoint = export_with_modelopt(source, tmp_path / "checkpoint", group_size)
    model = _load(source)
    _replace_linears(model, read_rank(checkpoint))
    network = engine(checkpoint, tmp_path / "engine", vocab_size=500)
    assert largest_difference(model, network, 500) <= TOLERANCE


def _replace_linears(model: Any, tensors: dict[str, npt.NDArray[Any]]) -> None:
    """Give the transformers model the weights that the int4 tensors stand for."""
    import torch

    def put(linear: Any, weight_NK: Floats) -> None:
        assert tuple(linear.weight.shape) == weight_NK.shape
        # A real int4 weight: close to the original, and not equal to it.
        error = (linear.weight.detach().numpy() - weight_NK).std() / weight_NK.std()
        assert 0.02 < error < 0.5
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight_NK))

    for index, layer in enumerate(model.model.layers):
        prefix = f"transformer.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        qkv_NK = _dequantized(tensors, f"{prefix}.attention.qkv")
        heads = attention.q_proj.out_features
        kv = attention.k_proj.out_features
        put(attention.q_proj, qkv_NK[:heads])
        put(attention.k_proj, qkv_NK[heads : heads + kv])
        put(attention.v_proj, qkv_NK[heads + kv :])
        put(attention.o_proj, _dequantized(tensors, f"{prefix}.attention.dense"))
        put(mlp.gate_proj, _dequantized(tensors, f"{prefix}.mlp.fc"))
        put(mlp.up_proj, _dequantized(tensors, f"{prefix}.mlp.gate"))
        put(mlp.down_proj, _dequantized(tensors, f"{prefix}.mlp.proj"))


def _dequantized(tensors: dict[str, npt.NDArray[Any]], module: str) -> Floats:
    """q * scale * prequant; the scale as float16, which is what an engine holds."""
    packed = tensors[f"{module}.weight"].view(np.uint8).astype(np.int64)
    nibbles = np.stack([packed % 16, packed // 16], axis=1).reshape(-1, packed.shape[1])
    values_NK = np.where(nibbles > 7, nibbles - 16, nibbles)
    scale = tensors[f"{module}.weights_scaling_factor"].astype(np.float16).astype(np.float32)
    scale_NK = np.repeat(scale, values_NK.shape[1] // scale.shape[1], axis=1)
    prequant_K = tensors[f"{module}.prequant_scaling_factor"].astype(np.float32)
    return (values_NK * scale_NK * prequant_K[None]).astype(np.float32)
