"""How far the engine's predictions are from the original's, per token and in sum.

Everything is computed in float64 from the logits, over the original's vocabulary only: an engine's
vocabulary may be padded, and a padded entry is no token.

Shape suffixes: T positions of one window, C positions of one chunk, V true vocabulary,
N all measured tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

_ROWS_BUDGET = 2**21
"""Logits turned to float64 at a time: 16 MiB per temporary."""


@dataclass(frozen=True)
class TokenStatistics:
    """One value per measured token.

    Where a side's logits are not finite, its loss and the KL are NaN, and there is no agreement.

    Attributes:
        original_loss_N, engine_loss_N: -log p(next token) of each side, in nats.
        kl_N: KL(original || engine) of the predicted distributions, in nats.
        same_top1_N: bool; both sides rank the same token first.
    """

    original_loss_N: Float64Array
    engine_loss_N: Float64Array
    kl_N: Float64Array
    same_top1_N: NDArray[np.bool_]

    @staticmethod
    def join(parts: list[TokenStatistics]) -> TokenStatistics:
        """Tokens of all parts, in order."""
        return TokenStatistics(
            np.concatenate([part.original_loss_N for part in parts]),
            np.concatenate([part.engine_loss_N for part in parts]),
            np.concatenate([part.kl_N for part in parts]),
            np.concatenate([part.same_top1_N for part in parts]),
        )


def log_softmax(logits_CV: NDArray[Any]) -> Float64Array:
    """Log-probabilities, float64 [C, V]; NaN in every row whose logits are not all finite."""
    shifted_CV = logits_CV.astype(np.float64)
    shifted_CV[~np.isfinite(shifted_CV).all(axis=1)] = np.nan
    shifted_CV -= shifted_CV.max(axis=1, keepdims=True)
    normalizer_C1 = np.log(np.exp(shifted_CV).sum(axis=1, keepdims=True))
    result: Float64Array = shifted_CV - normalizer_C1
    return result


def token_statistics(
    original_CV: NDArray[np.float32],
    engine_CV: NDArray[np.float32],
    next_tokens_C: NDArray[np.int64],
) -> TokenStatistics:
    """Compare logits of the same positions; both are over the true vocabulary."""
    assert original_CV.shape == engine_CV.shape, (original_CV.shape, engine_CV.shape)
    step = max(1, _ROWS_BUDGET // original_CV.shape[1])
    return TokenStatistics.join(
        [
            _few_positions(
                original_CV[start : start + step],
                engine_CV[start : start + step],
                next_tokens_C[start : start + step],
            )
            for start in range(0, len(next_tokens_C), step)
        ]
    )


def _few_positions(
    original_CV: NDArray[np.float32],
    engine_CV: NDArray[np.float32],
    next_tokens_C: NDArray[np.int64],
) -> TokenStatistics:
    original_log_CV = log_softmax(original_CV)
    engine_log_CV = log_softmax(engine_CV)
    kl_C = (np.exp(original_log_CV) * (original_log_CV - engine_log_CV)).sum(axis=1)
    rows_C = np.arange(len(next_tokens_C))
    return TokenStatistics(
        original_loss_N=-original_log_CV[rows_C, next_tokens_C],
        engine_loss_N=-engine_log_CV[rows_C, next_tokens_C],
        kl_N=np.maximum(kl_C, 0.0),  # below zero only by rounding; maximum() keeps NaN
        same_top1_N=(original_CV.argmax(axis=1) == engine_CV.argmax(axis=1)) & np.isfinite(kl_C),
    )


def perplexity(loss_N: Float64Array) -> float:
    """exp of the mean loss; inf when that is too large for a float, NaN when a loss is NaN."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss_N.mean()))
