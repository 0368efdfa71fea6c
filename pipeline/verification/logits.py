"""Where logits come from: the original through transformers, the engine through ONNX Runtime.

Both sides are interchangeable: they give the logits of all windows chunk by chunk, so that never more
than one chunk of logits exists.

Shape suffixes: W windows, T tokens of one window, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pipeline.engine.sharded import ShardedNetwork
    from pipeline.quant.layers.forward import LayerOutputs


class LogitsSource(Protocol):
    """One side of a comparison."""

    @property
    def vocab_size(self) -> int:
        """V; for an engine it may include padding."""

    def logits(self, tokens_WT: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        """Logits float32 [C, V] of positions 0..T-1 of one window after the other, `chunk_len` at a
        time (the last chunk of a window shorter).

        A window never sees anything of the others.
        """


class OriginalLogits:
    """The original checkpoint in transformers, float32, on the CPU, whose layers have run already."""

    def __init__(self, outputs: LayerOutputs, vocab_size: int) -> None:
        """Args:
        outputs: of batches of one window each.
        """
        self._outputs = outputs
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def logits(self, tokens_WT: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        num_windows, num_tokens = tokens_WT.shape
        for window in range(num_windows):
            for start in range(0, num_tokens, chunk_len):
                yield self._outputs.logits(window, 0, start, start + chunk_len).numpy()


class EngineLogits:
    """The engine's own network and weights on the CPU, seen from the rank that gathers them.

    The TensorRT engine of the same directory holds the same weights byte for byte (checked when it
    is built); this is the closest one can get to running it without its GPU.
    """

    def __init__(self, network: ShardedNetwork) -> None:
        self._network = network

    @property
    def vocab_size(self) -> int:
        return self._network.vocab_size

    def logits(self, tokens_WT: NDArray[np.int64], chunk_len: int) -> Iterator[NDArray[np.float32]]:
        for logits_CV in self._network.logits(tokens_WT, chunk_len):
            assert logits_CV is not None, "not the rank that gathers"
            yield logits_CV
