"""Choosing the next token from logits; every request has its own random stream.

V vocabulary, K tokens that may still be chosen.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import Problem, StageError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: keep only this many most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1 keeps all.
        seed: start of the random stream, 0 to 2**64 - 1; None draws one from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


class Sampler:
    """Chooses the tokens of one request.

    Exactly one random number is drawn per token, from a generator that no other request touches, so
    the choice depends on the seed, the position and the logits only: not on who shares the batch.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._random = np.random.Philox(key=seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return a token id.

        Args:
            logits: float32 [V], unnormalised; -inf forbids a token.

        Raises:
            StageError: the largest logit is NaN or infinite: the engine computed nonsense.
        """
        largest = float(logits.max())  # NaN anywhere makes it NaN
        if not np.isfinite(largest):
            raise StageError(
                Problem(
                    where="engine",
                    what=f"the largest logit is {largest}",
                    allowed="a finite number",
                    fix="verify the engine; an overflow in the weights or activations is likely",
                )
            )
        if self._options.temperature == 0.0:
            return int(logits.argmax())
        return self._draw(logits, largest)

    def _draw(self, logits: NDArray[np.float32], largest: float) -> int:
        # float64: a tiny temperature must not overflow, and sums over V must stay exact enough.
        scaled_V = (logits.astype(np.float64) - largest) / self._options.temperature
        ids_K = top_k_ids(scaled_V, self._options.top_k)
        weights_K = np.exp(scaled_V[ids_K])
        kept = top_p_indices(weights_K / weights_K.sum(), self._options.top_p)
        ids_K, weights_K = ids_K[kept], weights_K[kept]
        cumulative_K = np.cumsum(weights_K)
        position = np.searchsorted(cumulative_K, self._uniform() * cumulative_K[-1], side="right")
        return int(ids_K[min(int(position), len(ids_K) - 1)])

    def _uniform(self) -> float:
        """One number in [0, 1). From the raw stream, which numpy promises never to change."""
        return float(int(self._random.random_raw()) >> 11) * 2.0**-53


def top_k_ids(scores: NDArray[np.float64], top_k: int) -> NDArray[np.intp]:
    """Ids of the `top_k` largest scores, ascending; of equal scores the smaller id wins. 0 keeps all.

    Ascending order matters: two nearly equal scores may swap rank through rounding when the batch has
    another size, but ids never do, so the same random number still hits the same token.
    """
    if top_k == 0 or top_k >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
    above = np.flatnonzero(scores > threshold)
    equal = np.flatnonzero(scores == threshold)[: top_k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def top_p_indices(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices, ascending, of the smallest set of most likely entries whose sum reaches `top_p`."""
    if top_p >= 1.0:
        return np.arange(len(probabilities))
    # What lies below this bound sums to less than 1 - top_p, so the set never needs it: sort less.
    bound = (1.0 - top_p) / len(probabilities)
    likely = np.flatnonzero(probabilities >= bound)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    needed = int(np.searchsorted(np.cumsum(probabilities[order]), top_p, side="left")) + 1
    return np.sort(order[:needed])
