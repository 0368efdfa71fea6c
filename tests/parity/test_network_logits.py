"""Logits of transformers (float32) against ONNX Runtime on our network, from ModelOpt's own exports.

For int4 the transformers model gets the weights that the packed tensors stand for, computed here.
Shapes: B rows, S positions, V vocabulary, N output and K input features.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.network import BuildLimits, export_network
from pipeline.progress import SilentProgress
from tests.rank_checkpoints import export_with_modelopt, read_rank
from tests.tiny import write_tiny_llama

LIMITS = BuildLimits(max_batch_size=4, max_seq_len=64, max_input_len=32)
LENGTH = 24
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


def _logits_of_transformers(model: Any, ids_BS: npt.NDArray[np.int64]) -> Floats:
    import torch

    with torch.no_grad():
        logits: Floats = model(torch.from_numpy(ids_BS)).logits.numpy()
    return logits


def _load(source_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source_dir, dtype=torch.float32).eval()


def _engine(checkpoint_dir: Path, engine_dir: Path, vocab_size: int) -> OnnxNetwork:
    engine_dir.mkdir()
    export_network(checkpoint_dir, 0, engine_dir, LIMITS, SilentProgress(), vocab_size=vocab_size)
    return OnnxNetwork(engine_dir, num_threads=1)


def _random_ids(vocab_size: int, num_rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, vocab_size, (num_rows, LENGTH))


def _step(
    network: OnnxNetwork, ids_BS: npt.NDArray[np.int64], start: int, cache: KVCache
) -> Floats:
    """Logits of all positions of one call; every row stands at `start`."""
    num_rows, num_tokens = ids_BS.shape
    offsets = np.tile(np.arange(num_tokens), (num_rows, 1))
    starts = np.full(num_rows, start)
    return network.run(ids_BS, offsets + start, starts, starts + num_tokens, offsets, cache)


def _in_chunks(
    network: OnnxNetwork, ids_BS: npt.NDArray[np.int64], cuts: tuple[int, ...]
) -> Floats:
    cache = network.new_cache(len(ids_BS))
    bounds = (0, *cuts, ids_BS.shape[1])
    parts = [
        _step(network, ids_BS[:, start:stop], start, cache) for start, stop in pairwise(bounds)
    ]
    return np.concatenate(parts, axis=1)


def _rows_apart(network: OnnxNetwork, ids_BS: npt.NDArray[np.int64]) -> Floats:
    """Logits of the last position of each row, when each row's prompt has another length.

    The prompts go in one right-padded call, or row by row into views of the cache; then all rows
    decode together, each at its own position, until the longest ends.
    """
    num_rows = len(ids_BS)
    cache = network.new_cache(num_rows)
    lengths_B = LENGTH - 2 - 3 * np.arange(num_rows)
    padded_BS = np.where(np.arange(lengths_B[0])[None] < lengths_B[:, None], ids_BS[:, :-2], 7)
    _step(network, padded_BS[:2], 0, cache.rows(0, 2))
    for row in range(2, num_rows):
        _step(network, ids_BS[row : row + 1, : lengths_B[row]], 0, cache.rows(row, row + 1))
    zeros_B1 = np.zeros((num_rows, 1), np.int64)
    for _ in range(2):
        next_B1 = np.take_along_axis(ids_BS, lengths_B[:, None], axis=1)
        logits_B1V = network.run(
            next_B1, lengths_B[:, None], lengths_B, lengths_B + 1, zeros_B1, cache
        )
        lengths_B = lengths_B + 1
    return logits_B1V[:, 0]


def _check(model: Any, network: OnnxNetwork, vocab_size: int) -> None:
    ids_BS = _random_ids(vocab_size, 3)
    expected_BSV = _logits_of_transformers(model, ids_BS)
    assert expected_BSV.std() > 0.1, "logits that say nothing compare equal to anything"
    ways = {
        "prefill": (),
        "chunks": (5, 6, 17),
        "decode": tuple(range(10, LENGTH)),
    }
    for way, cuts in ways.items():
        difference = np.abs(_in_chunks(network, ids_BS, cuts) - expected_BSV).max()
        assert difference <= TOLERANCE, way
    last_B = LENGTH - 1 - 3 * np.arange(3)
    difference = np.abs(_rows_apart(network, ids_BS) - expected_BSV[np.arange(3), last_B]).max()
    assert difference <= TOLERANCE, "rows of different lengths"


@pytest.mark.parametrize("name", FP16_MODELS)
def test_fp16_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    source = write_tiny_llama(tmp_path / "source", **FP16_MODELS[name])
    checkpoint = export_with_modelopt(source, tmp_path / "checkpoint", group_size=None)
    model = _load(source)
    vocab_size = model.config.vocab_size
    network = _engine(checkpoint, tmp_path / "engine", vocab_size)
    assert network.shape.vocab_size == vocab_size
    _check(model, network, vocab_size)


@pytest.mark.parametrize("name", INT4_MODELS)
def test_int4_logits_equal_the_dequantized_model(tmp_path: Path, name: str) -> None:
    group_size, overrides = INT4_MODELS[name]
    source = write_tiny_llama(tmp_path / "source", vocab_size=500, **overrides)
    checkpoint = export_with_modelopt(source, tmp_path / "checkpoint", group_size)
    model = _load(source)
    _replace_linears(model, read_rank(checkpoint))
    _check(model, _engine(checkpoint, tmp_path / "engine", vocab_size=500), 500)


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
