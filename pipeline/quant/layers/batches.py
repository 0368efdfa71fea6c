"""Calibration windows as batches without padding.

Shape suffixes: W windows, T tokens of one window, B windows of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.quant.data import TokenWindows


@dataclass(frozen=True)
class Batch:
    """Windows of one length, in one forward pass.

    Attributes:
        windows: their numbers among all windows.
        tokens_BT: int64 [B, T], nothing padded.
    """

    windows: tuple[int, ...]
    tokens_BT: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """B * T."""
        return int(self.tokens_BT.size)


def equal_length_batches(windows: TokenWindows, batch_size: int) -> list[Batch]:
    """All windows in batches of at most `batch_size`, padding cut off.

    Windows of one length stay in their order; without a mask the batches are those of
    `TokenWindows.batches`. Causal models compute the same for a token whatever follows it, so cutting
    the padding changes no activation of a real token.
    """
    mask_WT = windows.mask_WT
    if mask_WT is None:
        mask_WT = np.ones(windows.tokens_WT.shape, np.bool_)
    by_length: dict[int, list[int]] = {}
    for window, length in enumerate(mask_WT.sum(axis=1)):
        by_length.setdefault(int(length), []).append(window)
    batches = []
    for _, members in sorted(by_length.items(), reverse=True):
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            rows = [windows.tokens_WT[window][mask_WT[window]] for window in chosen]
            batches.append(Batch(tuple(chosen), np.stack(rows).astype(np.int64)))
    return batches


def used_tokens(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """Every token id that occurs, sorted."""
    rows = [batch.tokens_BT.reshape(-1) for batch in batches]
    tokens_U: NDArray[np.int64] = np.unique(np.concatenate(rows))
    return tokens_U
