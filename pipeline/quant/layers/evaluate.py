"""Perplexity and KL divergence of checkpoints of any size, one decoder layer at a time.

Reads plain checkpoints and quantized ones, whose weights are dequantized exactly as stored: what is
measured is what was exported. Inputs of linears are rounded where the format does so; keys and values
never are.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.checkpoint.source import HfCheckpoint
from pipeline.progress import Progress, SilentProgress
from pipeline.quant.data import TokenWindows
from pipeline.quant.layers.batches import equal_length_batches
from pipeline.quant.layers.forward import LayerOutputs, run_layers


@dataclass(frozen=True)
class Comparison:
    """A checkpoint beside the original, over all positions that have a next token.

    Attributes:
        original_perplexity, perplexity: exp of the mean negative log likelihood, in nats.
        mean_kl: KL(original || checkpoint) of the next token's distribution, in nats.
        top1_agreement: share of positions where both find the same token most likely.
        num_positions: how many there were.
    """

    original_perplexity: float
    perplexity: float
    mean_kl: float
    top1_agreement: float
    num_positions: int


def compare_checkpoints(
    original: HfCheckpoint,
    other: HfCheckpoint,
    windows: TokenWindows,
    work_dir: Path,
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Comparison:
    """Run both over `windows` in `dtype`, and compare their logits window by window.

    Args:
        work_dir: an existing directory for hidden states; two files of W x T x H values for each
            checkpoint, which are removed.

    Raises:
        StageError: activations that are not finite, or no room on the disk.
    """
    batches = equal_length_batches(windows, batch_size)
    sides = [
        run_layers(checkpoint, batches, work_dir / name, dtype, progress or SilentProgress())
        for checkpoint, name in ((original, "original"), (other, "other"))
    ]
    totals = torch.zeros(4, dtype=torch.float64)
    num_positions = 0
    for index, batch in enumerate(batches):
        for row in range(len(batch.tokens_BT)):
            tokens_T = torch.from_numpy(batch.tokens_BT[row])
            logs = [_log_probabilities(side, index, row) for side in sides]
            totals += _sums(logs[0], logs[1], tokens_T[1:])
            num_positions += len(tokens_T) - 1
    for side in sides:
        side.path.unlink()
    original_nll, nll, kl, agreement = (totals / num_positions).tolist()
    return Comparison(math.exp(original_nll), math.exp(nll), kl, agreement, num_positions)


def _log_probabilities(side: LayerOutputs, index: int, row: int) -> torch.Tensor:
    """float32 [T - 1, V] of one window's positions that have a next token."""
    logits_TV = side.logits(index, row)[:-1]
    return torch.log_softmax(logits_TV.float(), dim=-1)


def _sums(original_TV: torch.Tensor, other_TV: torch.Tensor, next_T: torch.Tensor) -> torch.Tensor:
    """float64 [4]: both negative log likelihoods, KL and agreement, each summed over positions."""
    index_T1 = next_T[:, None]
    kl = (original_TV.exp() * (original_TV - other_TV)).sum(dim=-1)
    agreement = original_TV.argmax(dim=-1) == other_TV.argmax(dim=-1)
    sums = (
        -original_TV.gather(1, index_T1),
        -other_TV.gather(1, index_T1),
        kl,
        agreement,
    )
    return torch.stack([values.double().sum() for values in sums])
