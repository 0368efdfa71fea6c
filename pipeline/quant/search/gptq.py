"""GPTQ: rounding column after column, each error pushed into the columns that are still to come.

The columns keep their order, so a group stays S consecutive input features. Ranges are chosen when a
group begins, from the weights as they are then, by the smallest error weighted as GPTQ weighs it.

Shape suffixes: K input features, R rows of a block, G groups of S input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DAMPING = 0.01
"""Of the mean of the diagonal, added to it: the inverse exists and errors stay bounded."""

RANGE_RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(9))
_TINY = 1e-10


@dataclass(frozen=True)
class RoundedRows:
    """Codes -8 to 7 of rows; W' = (code - zero_point) * scale.

    Attributes:
        codes_RK: int8.
        scale_RG: float32.
        zero_point_RG: int8, all 0 for symmetric rounding.
    """

    codes_RK: torch.Tensor
    scale_RG: torch.Tensor
    zero_point_RG: torch.Tensor

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """W' [R, K] in a dtype."""
        num_rows, num_groups = self.scale_RG.shape
        codes = self.codes_RK.view(num_rows, num_groups, -1).float()
        values = (codes - self.zero_point_RG.float().unsqueeze(-1)) * self.scale_RG.unsqueeze(-1)
        return values.view_as(self.codes_RK).to(dtype)


def inverse_factor(gram_KK: torch.Tensor, damping: float = DAMPING) -> torch.Tensor | None:
    """U, upper triangular float32 [K, K], with U^T U the inverse of the damped G; None: no inverse.

    Features that are always 0 count as if they were independent of all others.
    """
    damped_KK = gram_KK.clone()
    diagonal_K = damped_KK.diagonal()
    diagonal_K.add_(damping * diagonal_K.mean())
    diagonal_K.masked_fill_(diagonal_K == 0, 1.0)  # only if G is 0 everywhere
    lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if int(failed):
        return None
    del damped_KK
    inverse_KK = torch.cholesky_inverse(lower_KK)
    del lower_KK
    upper_KK, failed = torch.linalg.cholesky_ex(inverse_KK, upper=True)
    return None if int(failed) else upper_KK


def gptq_rows(
    w_RK: torch.Tensor, upper_KK: torch.Tensor, group_size: int, *, asymmetric: bool
) -> RoundedRows:
    """Round `w_RK` (any float dtype, left alone) with error feedback; rows are independent."""
    w_KR = w_RK.float().t().contiguous()  # a column of the weight is contiguous
    codes_KR = torch.empty_like(w_KR, dtype=torch.int8)
    scales: list[torch.Tensor] = []
    zero_points: list[torch.Tensor] = []
    for start in range(0, len(w_KR), group_size):
        end = start + group_size
        block_SR = w_KR[start:end]
        upper_SS = upper_KK[start:end, start:end]
        weights_S = upper_SS.diagonal().pow(-2)
        scale_R, zero_R = best_range(block_SR, weights_S, asymmetric=asymmetric)
        errors_SR = torch.empty_like(block_SR)
        for column in range(group_size):
            value_R = block_SR[column]
            code_R = (value_R / scale_R).round_().add_(zero_R).clamp_(-8.0, 7.0)
            codes_KR[start + column] = code_R.to(torch.int8)
            error_R = value_R.sub(code_R.sub_(zero_R).mul_(scale_R)).div_(upper_SS[column, column])
            block_SR[column + 1 :].addr_(upper_SS[column, column + 1 :], error_R, alpha=-1.0)
            errors_SR[column] = error_R
        w_KR[end:].addmm_(upper_KK[start:end, end:].t(), errors_SR, alpha=-1.0)
        scales.append(scale_R)
        zero_points.append(zero_R.to(torch.int8))
    return RoundedRows(
        codes_KR.t().contiguous(),
        torch.stack(scales, dim=1).contiguous(),
        torch.stack(zero_points, dim=1).contiguous(),
    )


def nearest_rows(w_RK: torch.Tensor, group_size: int) -> RoundedRows:
    """Asymmetric round-to-nearest: scale and zero point from the least and largest of each group."""
    num_rows, num_features = w_RK.shape
    grouped = w_RK.float().view(num_rows, num_features // group_size, group_size)
    scale, zero = _asymmetric_range(grouped.amin(-1), grouped.amax(-1))
    codes = (grouped / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(-8.0, 7.0)
    return RoundedRows(codes.view_as(w_RK).to(torch.int8), scale, zero.to(torch.int8))


def best_range(
    block_SR: torch.Tensor, weights_S: torch.Tensor, *, asymmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, float32 [R] each, with the least weighted squared error of one group."""
    low_R, high_R = block_SR.amin(0), block_SR.amax(0)
    amax_R = torch.maximum(-low_R, high_R)
    best_scale = best_zero = best_loss = None
    for ratio in RANGE_RATIOS:
        if asymmetric:
            scale_R, zero_R = _asymmetric_range(low_R * ratio, high_R * ratio)
        else:
            scale_R = (amax_R * (ratio / 7.0)).clamp_min_(_TINY)
            zero_R = torch.zeros_like(scale_R)
        codes_SR = (block_SR / scale_R).round_().add_(zero_R).clamp_(-8.0, 7.0)
        error_SR = codes_SR.sub_(zero_R).mul_(scale_R).sub_(block_SR).square_()
        loss_R = weights_S @ error_SR
        if best_scale is None or best_zero is None or best_loss is None:
            best_scale, best_zero, best_loss = scale_R, zero_R, loss_R
        else:
            better = loss_R < best_loss
            best_scale = torch.where(better, scale_R, best_scale)
            best_zero = torch.where(better, zero_R, best_zero)
            best_loss = torch.where(better, loss_R, best_loss)
    assert best_scale is not None
    assert best_zero is not None
    return best_scale, best_zero


def _asymmetric_range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (-8 to 7) so that codes -8 to 7 cover low to high and hit 0 exactly."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / 15.0).clamp_min_(_TINY)
    return scale, (-8.0 - low / scale).round_().clamp_(-8.0, 7.0)
