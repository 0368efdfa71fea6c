"""Loss of a causal language model on text, with one windowing for every figure about the demo.

The documents become one row of tokens, each document followed by `</s>`. The row is cut into
consecutive windows of `window - 1` tokens; each is read after one `<s>`, and all its tokens are
predicted. So every token counts exactly once and none sees text before its window.

Shape suffixes: S positions of a window, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.demo.tokenizer import BOS_ID

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 512


@torch.no_grad()
def mean_loss(model: Any, tokens: NDArray[np.int64], window: int = WINDOW) -> float:
    """Mean negative log-likelihood in nats per token of `tokens` [T] under a transformers model."""
    total = 0.0
    for start in range(0, len(tokens), window - 1):
        body = tokens[start : start + window - 1]
        row_S = torch.from_numpy(np.concatenate([[BOS_ID], body]))
        logits_SV = model(row_S[None, :-1], use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits_SV, row_S[1:], reduction="sum")
        total += loss.item()
    return total / len(tokens)
