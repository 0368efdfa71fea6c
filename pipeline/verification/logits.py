"""Where logits come from: the original through transformers, the engine through ONNX Runtime.

Both sides are interchangeable: they take one window of tokens and give its logits chunk by chunk, so
that never more than one chunk of logits exists.

Shape suffixes: B = 1 row, T positions of one window, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.engine.onnxruntime import OnnxNetwork


class LogitsSource(Protocol):
    """One side of a comparison."""

    @property
    def vocab_size(self) -> int:
        """V; for an engine it may include padding."""

    def logits(self, tokens_T: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        """Logits float32 [C, V] of positions 0..T-1, `chunk_len` at a time (the last chunk shorter).

        A window never sees anything of the windows before it.
        """


class OriginalLogits:
    """The original checkpoint in transformers, float32, on the CPU.

    transformers' own forward pass is used, fed chunk by chunk through its own KV cache.

    Raises:
        CheckpointError: see `pipeline.quant.source.load_model`.
    """

    def __init__(self, source_dir: Path) -> None:
        import torch

        from pipeline.quant.source import load_model

        self._model: Any = load_model(source_dir, torch.float32)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def logits(self, tokens_T: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        for chunk_C in _chunks(tokens_T, chunk_len):
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.from_numpy(chunk_C)[None], past_key_values=cache, use_cache=True
                )
            yield output.logits[0].numpy()


class EngineLogits:
    """The engine's own network and weights on the CPU (`rank0.onnx`).

    The TensorRT engine of the same directory holds the same weights byte for byte (checked when it
    is built); this is the closest one can get to running it without its GPU.
    """

    def __init__(self, network: OnnxNetwork) -> None:
        self._network = network

    @property
    def vocab_size(self) -> int:
        return int(self._network.shape.vocab_size)

    def logits(self, tokens_T: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        # A new cache for every window: 0 * NaN is NaN, so one bad window could spoil the next ones.
        cache = self._network.new_cache(1)
        start = 0
        for chunk_C in _chunks(tokens_T, chunk_len):
            end = start + len(chunk_C)
            logits_BCV = self._network.run(
                input_ids=chunk_C[None],
                position_ids=np.arange(start, end, dtype=np.int64)[None],
                write_indices=np.asarray([start], np.int64),
                kv_lengths=np.asarray([end], np.int64),
                logit_positions=np.arange(len(chunk_C), dtype=np.int64)[None],
                cache=cache,
            )
            yield logits_BCV[0]
            start = end


def _chunks(tokens_T: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(tokens_T), chunk_len):
        # A copy: the caller's array may be read-only, which torch.from_numpy warns about.
        yield tokens_T[start : start + chunk_len].copy()
