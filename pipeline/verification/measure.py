"""Statistics of all windows of both sides, never more than one chunk of logits of each in memory.

Shape suffixes: W windows, T tokens of one window, C positions of one chunk, V vocabulary,
N = T - 1 predictions of one window.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.progress import Progress
from pipeline.verification.logits import LogitsSource
from pipeline.verification.report import NotFinite
from pipeline.verification.statistics import TokenStatistics, token_statistics

_FIELDS = [field.name for field in fields(TokenStatistics)]


@dataclass(frozen=True)
class Measurement:
    """All windows of both sides.

    Attributes:
        windows: statistics of each window.
        not_finite: where logits are NaN or infinite, first position of each side of a window.
    """

    windows: tuple[TokenStatistics, ...]
    not_finite: tuple[NotFinite, ...]

    def save(self, path: Path) -> None:
        """Write an .npz file: [W, N] of each statistic."""
        arrays = {
            name: np.stack([getattr(window, name) for window in self.windows]) for name in _FIELDS
        }
        bad = json.dumps([found.model_dump() for found in self.not_finite])
        np.savez(path, allow_pickle=False, not_finite=np.array(bad), **arrays)

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """The inverse of `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            rows = zip(*(arrays[name] for name in _FIELDS), strict=True)
            windows = tuple(TokenStatistics(*row) for row in rows)
            bad = json.loads(str(arrays["not_finite"]))
        return cls(windows, tuple(NotFinite(**found) for found in bad))


def measure(
    original: LogitsSource,
    engine: LogitsSource,
    tokens_WT: NDArray[np.int64],
    chunk_len: int,
    progress: Progress,
) -> Measurement:
    """Statistics of every next-token prediction inside each window (T - 1 of T positions).

    Args:
        progress: told of every window.
    """
    assert engine.vocab_size >= original.vocab_size, "the caller has compared them"
    both = zip(
        original.logits(tokens_WT, chunk_len), engine.logits(tokens_WT, chunk_len), strict=True
    )
    results: list[TokenStatistics] = []
    not_finite: list[NotFinite] = []
    for index, tokens_T in enumerate(tokens_WT):
        parts: list[TokenStatistics] = []
        bad: dict[str, NotFinite] = {}
        for start in range(0, len(tokens_T), chunk_len):
            original_CV, padded_CV = next(both)
            engine_CV = padded_CV[:, : original.vocab_size]
            for found in _not_finite(original_CV, engine_CV, index, start):
                bad.setdefault(found.side, found)
            next_C = tokens_T[start + 1 : start + 1 + len(original_CV)]
            num = len(next_C)  # one less in the last chunk: the last position has no next token
            if num:
                parts.append(token_statistics(original_CV[:num], engine_CV[:num], next_C))
        results.append(TokenStatistics.join(parts))
        not_finite.extend(bad.values())
        progress.advance(f"KL {results[-1].kl_N.mean():.4g} nats")
    assert next(both, None) is None
    return Measurement(tuple(results), tuple(not_finite))


def _not_finite(
    original_CV: NDArray[np.float32], engine_CV: NDArray[np.float32], window: int, start: int
) -> Iterator[NotFinite]:
    sides: tuple[tuple[Literal["original", "engine"], NDArray[np.float32]], ...] = (
        ("original", original_CV),
        ("engine", engine_CV),
    )
    for side, logits_CV in sides:
        finite_C = np.isfinite(logits_CV).all(axis=1)
        if not finite_C.all():
            yield NotFinite(side=side, window=window, position=start + int(finite_C.argmin()))
