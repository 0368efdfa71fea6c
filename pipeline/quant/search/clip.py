"""Clipping of group maxima, searched on the blocks of G that belong to one group.

A smaller range rounds the many small weights of a group more finely and cuts its few large ones. The
ratio of each output row and group is chosen by the error of that group alone, x_g G_gg x_g^T; then each
row keeps its clipping only if that lowers its whole error, so clipping never makes a loss higher.

Shape suffixes: K input features, R rows of a block, G groups of S input features.
"""

from __future__ import annotations

import torch

from pipeline.quant.search.moments import SecondMoment
from pipeline.quant.search.rounding import group_amax, int4_groups

CLIP_RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(11))
"""1 to 0.5, as in ModelOpt's awq_clip."""


def clipped_amax(
    w_RK: torch.Tensor,
    scaled_RK: torch.Tensor,
    inverse_K: torch.Tensor | None,
    moment: SecondMoment,
    grams_GSS: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """The range of each group, float32 [R, G], and by how much it lowers the loss of these rows.

    Args:
        w_RK: original weights.
        scaled_RK: what is rounded: the weights times their scale, in their dtype.
        inverse_K: what inputs are multiplied by; None: no scale.
        grams_GSS: `moment.group_grams`.
    """
    full_RG = group_amax(scaled_RK, grams_GSS.shape[-1])
    best_RG, best_loss_RG = full_RG, _group_losses(w_RK, scaled_RK, inverse_K, full_RG, grams_GSS)
    for ratio in CLIP_RATIOS[1:]:
        amax_RG = full_RG * ratio
        loss_RG = _group_losses(w_RK, scaled_RK, inverse_K, amax_RG, grams_GSS)
        better = loss_RG < best_loss_RG
        best_RG = torch.where(better, amax_RG, best_RG)
        best_loss_RG = torch.where(better, loss_RG, best_loss_RG)
    unclipped_R = moment.row_losses(range_difference(w_RK, scaled_RK, inverse_K, full_RG))
    clipped_R = moment.row_losses(range_difference(w_RK, scaled_RK, inverse_K, best_RG))
    better_R = clipped_R < unclipped_R
    gained = (unclipped_R - clipped_R)[better_R].double().sum()
    return torch.where(better_R.unsqueeze(-1), best_RG, full_RG), float(gained)


def range_difference(
    w_RK: torch.Tensor,
    scaled_RK: torch.Tensor,
    inverse_K: torch.Tensor | None,
    amax_RG: torch.Tensor,
) -> torch.Tensor:
    """Rounded with these ranges minus the original, seen from the unscaled input: float32 [R, K]."""
    rounded_RK = int4_groups(scaled_RK, amax_RG)
    if inverse_K is not None:
        rounded_RK.mul_(inverse_K.float())
    return rounded_RK.sub_(w_RK.float())


def _group_losses(
    w_RK: torch.Tensor,
    scaled_RK: torch.Tensor,
    inverse_K: torch.Tensor | None,
    amax_RG: torch.Tensor,
    grams_GSS: torch.Tensor,
) -> torch.Tensor:
    d_RK = range_difference(w_RK, scaled_RK, inverse_K, amax_RG)
    d_GRS = d_RK.view(*amax_RG.shape, -1).transpose(0, 1)
    return torch.bmm(d_GRS, grams_GSS).mul_(d_GRS).sum(-1).t()
