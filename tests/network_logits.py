"""Logits of transformers and of ONNX Runtime on our network, in every way a session calls it.

Shapes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine.kv_cache import KVCache
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.network import BuildLimits, export_network, tensorrt_graph_path
from pipeline.network.io_names import (
    INPUT_IDS,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
)
from pipeline.progress import SilentProgress

LIMITS = BuildLimits(max_batch_size=4, max_seq_len=64, max_input_len=32)
LENGTH = 24

Floats = npt.NDArray[np.float32]


def logits_of_transformers(model: Any, ids_BS: npt.NDArray[np.int64]) -> Floats:
    """Of every position, in one call."""
    import torch

    with torch.no_grad():
        logits: Floats = model(torch.from_numpy(ids_BS)).logits.numpy()
    return logits


def engine(
    checkpoint_dir: Path,
    engine_dir: Path,
    vocab_size: int | None = None,
    limits: BuildLimits = LIMITS,
) -> OnnxNetwork:
    """The exported network, loaded."""
    engine_dir.mkdir()
    export_network(checkpoint_dir, 0, engine_dir, limits, SilentProgress(), vocab_size=vocab_size)
    return OnnxNetwork(engine_dir, num_threads=1)


def random_ids(vocab_size: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Rows of LENGTH tokens, always the same."""
    return np.random.default_rng(1).integers(0, vocab_size, (num_rows, LENGTH))


def _step(
    network: OnnxNetwork, ids_BS: npt.NDArray[np.int64], start: int, cache: KVCache
) -> Floats:
    """Logits of all positions of one call; every row stands at `start`."""
    num_rows, num_tokens = ids_BS.shape
    offsets = np.tile(np.arange(num_tokens), (num_rows, 1))
    starts = np.full(num_rows, start)
    return network.run(ids_BS, offsets + start, starts, starts + num_tokens, offsets, cache)


def whole(network: OnnxNetwork, ids_BS: npt.NDArray[np.int64]) -> Floats:
    """Logits of every position, in one call."""
    return logits_in_chunks(network, ids_BS, ())


def logits_in_chunks(
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


def logits_of_network(network: OnnxNetwork, ids_BS: npt.NDArray[np.int64]) -> Floats:
    """Of every position, in one call."""
    return logits_in_chunks(network, ids_BS, ())


def largest_difference(model: Any, network: OnnxNetwork, vocab_size: int) -> float:
    """Of logits of 3 rows of LENGTH tokens: prefill, chunks, decode, and rows of different lengths."""
    ids_BS = random_ids(vocab_size, 3)
    expected_BSV = logits_of_transformers(model, ids_BS)
    assert expected_BSV.std() > 0.1, "logits that say nothing compare equal to anything"
    ways = ((), (5, 6, 17), tuple(range(10, LENGTH)))
    differences = [
        np.abs(logits_in_chunks(network, ids_BS, cuts) - expected_BSV).max() for cuts in ways
    ]
    last_B = LENGTH - 1 - 3 * np.arange(3)
    last_BV = expected_BSV[np.arange(3), last_B]
    differences.append(np.abs(_rows_apart(network, ids_BS) - last_BV).max())
    return float(max(differences))


def logits_of_tensorrt_graph(engine_dir: Path, ids_BS: npt.NDArray[np.int64], cut: int) -> Floats:
    """Of every position, in two calls of ONNX Runtime on the float16 graph that TensorRT parses.

    ONNX Runtime rounds to float16 where the graph does, though it may compute in float32 between.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # that the cache is copied does not matter here
    path = tensorrt_graph_path(engine_dir, 0)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    num_rows, num_tokens = ids_BS.shape
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_")]
    cache = {value.name: np.zeros((num_rows, *value.shape[1:]), np.float16) for value in pasts}
    outputs = [name.replace("past_", "present_") for name in cache]
    parts = []
    for start, stop in ((0, cut), (cut, num_tokens)):
        offsets = np.tile(np.arange(stop - start), (num_rows, 1))
        feeds = {
            INPUT_IDS: ids_BS[:, start:stop],
            POSITION_IDS: offsets + start,
            WRITE_INDICES: np.full(num_rows, start),
            KV_LENGTHS: np.full(num_rows, stop),
            LOGIT_POSITIONS: offsets,
        }
        logits_BSV, *presents = session.run([LOGITS, *outputs], {**feeds, **cache})
        cache = dict(zip(cache, presents, strict=True))
        parts.append(logits_BSV)
    return np.concatenate(parts, axis=1)
