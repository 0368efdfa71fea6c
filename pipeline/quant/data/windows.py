"""The product of calibration data: windows of token ids, named by digest.

Shape suffixes: W windows, T tokens of one window, B windows of one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenWindows:
    """Chosen windows of token ids.

    Attributes:
        tokens_WT: int64 [W, T].
        num_available: windows that the text would have given.
        num_text_tokens: tokens of the whole text, separators included, prefixes not.
        mask_WT: bool [W, T], True for a real token, False for padding; None: every token is real.
            Pad tokens have an id that the model knows, so that they can be embedded, but nothing
            computed at their positions may enter a statistic.
    """

    tokens_WT: NDArray[np.int64]
    num_available: int
    num_text_tokens: int
    mask_WT: NDArray[np.bool_] | None = None

    @property
    def digest(self) -> str:
        """sha256 of the shape, of exactly the token ids used and of the mask, as lower-case hex."""
        tokens = np.ascontiguousarray(self.tokens_WT, dtype="<i8")
        digest = hashlib.sha256(f"{tokens.shape[0]}x{tokens.shape[1]}:".encode())
        digest.update(tokens.tobytes())
        if self.mask_WT is not None:
            digest.update(b"mask:" + np.ascontiguousarray(self.mask_WT, dtype=np.uint8).tobytes())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        """Real tokens of all windows."""
        return int(self.tokens_WT.size if self.mask_WT is None else self.mask_WT.sum())

    def batches(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Views int64 [B, T] in order; the last one may be smaller."""
        for first in range(0, len(self.tokens_WT), batch_size):
            yield self.tokens_WT[first : first + batch_size]
