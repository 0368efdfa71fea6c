"""AWQ's scale of input channels, searched on second moments for all linears that must share it.

The family of scales is ModelOpt's (`awq_lite`): a^alpha / w^(1 - alpha), where a is the mean |x| of a
channel and w the mean of |W| relative to its group's largest. What a candidate is judged by is exactly
what is kept of it: weights multiplied by the scale in their dtype, rounded to int4 in their dtype,
inputs multiplied by the reciprocal in their dtype. The candidate "no scale" is round-to-nearest.

Losses are sums over output rows, so candidates race: after each block of rows, those that are behind
the leader by more than RACE_ERRORS standard errors of the difference (row by row) leave. So do those
that cannot be ahead by more than EQUAL of the leader's loss, with EQUAL_ERRORS: where no channel stands
out, as in random weights, all scales are nearly equal, and telling them apart would take every row for
nothing. The winner and round-to-nearest are always measured on every row.

Shape suffixes: N output features, K input features, R rows of a block, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.quant.search.moments import SecondMoment
from pipeline.quant.search.rounding import int4_nearest, row_blocks

ALPHA_STEP = 0.05
RACE_ERRORS = 6.0
EQUAL = 0.005
"""Half a percent of the leader's loss; outlier channels make scales differ by factors."""
EQUAL_ERRORS = 3.0
EQUAL_ROWS = 1536
"""Fewer rows cost so little that their candidates race to the end."""
RACE_ROWS = 256
"""Rows of a block: enough for a standard error, few enough that most candidates cost little."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ScaledWeight:
    """A linear that gets the scale, and the moment of its input; None: no token reached it."""

    weight_NK: torch.Tensor
    moment: SecondMoment | None


@dataclass(frozen=True)
class ScaleChoice:
    """What the search chose.

    Attributes:
        alpha: None: no scale, round-to-nearest was at least as good.
        scale_K: in the weights' dtype, what weights are multiplied by; None with alpha None.
        inverse_K: in the weights' dtype, what inputs are multiplied by.
        losses: of each linear, squared error summed over tokens and outputs; 0 without tokens.
        rtn_losses: the same without a scale.
        curve: alpha -> loss of all linears together, for those measured on every row.
    """

    alpha: float | None
    scale_K: torch.Tensor | None
    inverse_K: torch.Tensor | None
    losses: tuple[float, ...]
    rtn_losses: tuple[float, ...]
    curve: dict[float | None, float]


def relative_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of |W| / largest |W| of its group: float32 [K]."""
    total_K = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight_NK in weights:
        for rows in row_blocks(weight_NK):
            w_RK = weight_NK[rows].abs().float()
            grouped = w_RK.view(len(w_RK), -1, group_size)
            grouped.div_(grouped.amax(-1, keepdim=True).add_(_TINY))
            total_K += w_RK.sum(0, dtype=torch.float64)
    return (total_K / sum(map(len, weights))).float()


def scale_of(activation_K: torch.Tensor, weight_K: torch.Tensor, alpha: float) -> torch.Tensor:
    """ModelOpt's scale for one alpha: float32 [K], geometric middle 1."""
    scale_K = activation_K.pow(alpha) / (weight_K.pow(1 - alpha) + _TINY)
    scale_K = scale_K.clamp_(1e-4, 1e4)
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def alphas(step: float = ALPHA_STEP) -> list[float]:
    """0 to 1, as ModelOpt has them: multiples of the step rounded to float32."""
    return [float(alpha) for alpha in torch.arange(0, 1.0 + step / 2, step, dtype=torch.float32)]


def search_scale(
    linears: Sequence[ScaledWeight],
    activation_K: torch.Tensor,
    amax_K: torch.Tensor,
    group_size: int,
    *,
    alpha_step: float = ALPHA_STEP,
    exhaustive: bool = False,
) -> ScaleChoice:
    """The best scale for `linears` together, by the sum of their squared output errors.

    Args:
        activation_K: mean |x| of each input feature over all tokens of all linears, float32.
        amax_K: largest |x|; a scale that lets the input overflow its dtype is no candidate.
        exhaustive: measure every candidate on every row.
    """
    dtype = linears[0].weight_NK.dtype
    weight_K = relative_magnitude([linear.weight_NK for linear in linears], group_size)
    scales: list[tuple[float | None, torch.Tensor | None, torch.Tensor | None]] = [
        (None, None, None)
    ]
    for step in alphas(alpha_step):
        scale_K = scale_of(activation_K, weight_K, step)
        inverse_K = (1 / scale_K).to(dtype)
        if float((amax_K * inverse_K.float()).max()) <= torch.finfo(dtype).max:
            scales.append((step, scale_K.to(dtype), inverse_K))
    race = _Race([pair[1:] for pair in scales], group_size, exhaustive=exhaustive)
    for block in _strided_blocks(linears):
        race.run(block)
    best = race.winner()
    alpha, scale, inverse = scales[best]
    return ScaleChoice(
        alpha=alpha,
        scale_K=scale,
        inverse_K=inverse,
        losses=race.losses_of(best, len(linears)),
        rtn_losses=race.losses_of(0, len(linears)),
        curve={scales[index][0]: race.total(index) for index in race.finalists()},
    )


def scaled_difference(
    w_RK: torch.Tensor,
    scale_K: torch.Tensor | None,
    inverse_K: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """What is computed minus what should be, seen from the unscaled input: float32 [R, K]."""
    if scale_K is None or inverse_K is None:
        return int4_nearest(w_RK, group_size).sub_(w_RK.float())
    rounded_RK = int4_nearest(w_RK * scale_K, group_size)
    return rounded_RK.mul_(inverse_K.float()).sub_(w_RK.float())


@dataclass(frozen=True)
class _Block:
    linear: int
    w_RK: torch.Tensor
    moment: SecondMoment


def _strided_blocks(linears: Sequence[ScaledWeight]) -> list[list[_Block]]:
    """Every row once; each entry a sample of evenly spaced rows of every linear."""
    num_rows = sum(len(linear.weight_NK) for linear in linears)
    count = math.ceil(num_rows / RACE_ROWS)
    return [
        [
            _Block(index, linear.weight_NK[start::count], linear.moment)
            for index, linear in enumerate(linears)
            if linear.moment is not None and start < len(linear.weight_NK)
        ]
        for start in range(count)
    ]


class _Race:
    """Losses of rows, candidate by candidate, and who is still in. Candidate 0 never leaves."""

    def __init__(
        self,
        scales: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
        group_size: int,
        *,
        exhaustive: bool,
    ) -> None:
        self._scales = scales
        self._group_size = group_size
        self._exhaustive = exhaustive
        self._running = list(range(len(scales)))
        self._rows: list[list[torch.Tensor]] = [[] for _ in scales]
        self._totals = [0.0] * len(scales)
        self._owners: list[tuple[int, int]] = []  # linear and number of rows, in the order of _rows

    def run(self, blocks: Sequence[_Block]) -> None:
        """Measure everyone still in on these rows, then let the beaten leave."""
        for block in blocks:
            self._owners.append((block.linear, len(block.w_RK)))
            for candidate in self._running:
                d_RK = scaled_difference(block.w_RK, *self._scales[candidate], self._group_size)
                losses_R = block.moment.row_losses(d_RK).double().cpu()
                losses_R = torch.where(losses_R.isnan(), math.inf, losses_R)
                self._rows[candidate].append(losses_R)
                self._totals[candidate] += float(losses_R.sum())
        if not self._exhaustive:
            self._drop_beaten()

    def _drop_beaten(self) -> None:
        leader = min(self._running, key=self.total)
        if set(self._running) <= {0, leader}:
            return
        losses = {candidate: torch.cat(self._rows[candidate]) for candidate in self._running}
        self._running = [
            candidate
            for candidate in self._running
            if candidate in (0, leader) or not _is_beaten(losses[candidate], losses[leader])
        ]

    def total(self, candidate: int) -> float:
        return self._totals[candidate]

    def finalists(self) -> list[int]:
        """Those that were measured on every row."""
        return list(self._running)

    def winner(self) -> int:
        return min(self._running, key=self.total)  # the first of equals: no scale

    def losses_of(self, candidate: int, num_linears: int) -> tuple[float, ...]:
        """The sum for each linear."""
        sums = [0.0] * num_linears
        for (linear, _), losses_R in zip(self._owners, self._rows[candidate], strict=True):
            sums[linear] += float(losses_R.sum())
        return tuple(sums)


def _is_beaten(losses_R: torch.Tensor, leader_R: torch.Tensor) -> bool:
    """Whether it is certainly behind the leader, or at best ahead by what does not count."""
    difference_R = losses_R - leader_R
    if not bool(torch.isfinite(difference_R).all()):
        return True
    behind = float(difference_R.mean())
    error = float(difference_R.std()) / math.sqrt(len(difference_R))
    if behind > RACE_ERRORS * error:
        return True
    most_ahead = EQUAL_ERRORS * error - behind
    return len(leader_R) > EQUAL_ROWS and most_ahead < EQUAL * float(leader_R.mean())
