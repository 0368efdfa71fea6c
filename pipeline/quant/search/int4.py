"""Int4 for all linears that share a scale: search it, clip or feed errors back, and write the result.

Shape suffixes: N output features, K input features, R rows of a block, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.errors import Problem, StageError
from pipeline.quant.recipe import LinearFacts
from pipeline.quant.search.clip import clipped_amax
from pipeline.quant.search.gptq import RoundedRows, gptq_rows, inverse_factor, nearest_rows
from pipeline.quant.search.inputs import InputStatistics, joint_range
from pipeline.quant.search.modules import calibrate_weight, set_input_scale, set_int4_ranges
from pipeline.quant.search.moments import SecondMoment
from pipeline.quant.search.rounding import int4_nearest, row_blocks
from pipeline.quant.search.scale import ALPHA_STEP, ScaleChoice, ScaledWeight, search_scale

NO_TOKENS = "no calibration token reached this linear"


@dataclass(frozen=True)
class Int4Options:
    """How int4 weights are made.

    Attributes:
        format: "int4_awq", "w4a8_awq" (symmetric) or "int4_gptq" (with zero points).
        algorithm: one of the format's `ALGORITHMS`.
        group_size: input features that share a scale.
        alpha_step: grid of the scale search.
        exhaustive: measure every candidate in full.
    """

    format: str
    algorithm: str
    group_size: int
    alpha_step: float = ALPHA_STEP
    exhaustive: bool = False


def quantize_int4(
    linears: Mapping[str, Any],
    inputs: Mapping[str, InputStatistics],
    options: Int4Options,
) -> dict[str, LinearFacts]:
    """Quantize linears that must have one scale; weights and quantizers are changed in place.

    Args:
        linears: name -> ModelOpt's quantized linear.
        inputs: of those that saw tokens.

    Raises:
        StageError: a loss that is not finite.
    """
    if options.algorithm in ("awq", "awq_clip") and inputs:
        return _scaled(linears, inputs, options)
    rounded = _with_zero_points if options.format == "int4_gptq" else _symmetric
    factors: dict[int, torch.Tensor | None] = {}
    return {
        name: rounded(name, linear, inputs.get(name), options, factors)
        for name, linear in linears.items()
    }


def _scaled(
    linears: Mapping[str, Any], inputs: Mapping[str, InputStatistics], options: Int4Options
) -> dict[str, LinearFacts]:
    distinct = list({id(value): value for value in inputs.values()}.values())
    amax_K = joint_range(inputs)
    magnitude_K = torch.stack([value.magnitude_K for value in distinct]).sum(0)
    choice = search_scale(
        [
            ScaledWeight(linear.weight.detach(), _moment(inputs.get(name)))
            for name, linear in linears.items()
        ],
        magnitude_K / sum(value.num_tokens for value in distinct),
        amax_K,
        options.group_size,
        alpha_step=options.alpha_step,
        exhaustive=options.exhaustive,
    )
    facts = {}
    for index, (name, linear) in enumerate(linears.items()):
        loss, rtn_loss = choice.losses[index], choice.rtn_losses[index]
        statistics = inputs.get(name)
        loss -= _write_scaled(linear, choice, statistics, options)
        facts[name] = _facts(name, linear, statistics, options, choice.alpha, loss, rtn_loss)
        if choice.inverse_K is not None:
            set_input_scale(linear, choice.inverse_K, amax_K)
    return facts


def _moment(statistics: InputStatistics | None) -> SecondMoment | None:
    return None if statistics is None else statistics.moment


def _write_scaled(
    linear: Any, choice: ScaleChoice, statistics: InputStatistics | None, options: Int4Options
) -> float:
    """Scale in place and set the ranges; by how much clipping lowered the loss."""
    weight_NK: torch.Tensor = linear.weight.detach()
    moment = _moment(statistics)
    grams = None
    if options.algorithm == "awq_clip" and moment is not None:
        grams = moment.group_grams(options.group_size)
    ranges, gained = [], 0.0
    for rows in row_blocks(weight_NK):
        w_RK = weight_NK[rows]
        scaled_RK = w_RK if choice.scale_K is None else w_RK * choice.scale_K
        if grams is not None and moment is not None:
            amax_RG, lower = clipped_amax(w_RK, scaled_RK, choice.inverse_K, moment, grams)
            ranges.append(amax_RG)
            gained += lower
        weight_NK[rows] = scaled_RK
    if grams is None:
        calibrate_weight(linear)
    else:
        set_int4_ranges(linear, torch.cat(ranges))
    return gained


def _symmetric(
    name: str,
    linear: Any,
    statistics: InputStatistics | None,
    options: Int4Options,
    factors: dict[int, torch.Tensor | None],
) -> LinearFacts:
    weight_NK: torch.Tensor = linear.weight.detach()
    moment = _moment(statistics)
    rtn_loss = 0.0
    for rows in row_blocks(weight_NK):
        if moment is not None:
            w_RK = weight_NK[rows]
            d_RK = int4_nearest(w_RK, options.group_size).sub_(w_RK.float())
            rtn_loss += float(moment.row_losses(d_RK).double().sum())
    better = _better_gptq(weight_NK, moment, options, factors, rtn_loss)
    if better is None:
        calibrate_weight(linear)
        return _facts(name, linear, statistics, options, None, rtn_loss, rtn_loss)
    rounded, loss = better
    weight_NK.copy_(rounded.dequantized(weight_NK.dtype))
    set_int4_ranges(linear, rounded.scale_RG * 7.0)
    return _facts(name, linear, statistics, options, None, loss, rtn_loss)


def _with_zero_points(
    name: str,
    linear: Any,
    statistics: InputStatistics | None,
    options: Int4Options,
    factors: dict[int, torch.Tensor | None],
) -> LinearFacts:
    weight_NK: torch.Tensor = linear.weight.detach()
    moment = _moment(statistics)
    nearest = _joined(
        [nearest_rows(weight_NK[rows], options.group_size) for rows in row_blocks(weight_NK)]
    )
    rtn_loss = _loss(weight_NK, nearest, moment)
    better = _better_gptq(weight_NK, moment, options, factors, rtn_loss)
    rounded, loss = better or (nearest, rtn_loss)
    weight_NK.copy_(rounded.dequantized(weight_NK.dtype))
    linear.register_buffer("weight_scale_NG", rounded.scale_RG)
    linear.register_buffer("weight_zero_point_NG", rounded.zero_point_RG)
    return _facts(name, linear, statistics, options, None, loss, rtn_loss)


def _factor(
    moment: SecondMoment | None, factors: dict[int, torch.Tensor | None]
) -> torch.Tensor | None:
    """The inverse's factor of an input, computed once for all linears that read it."""
    if moment is None:
        return None
    if id(moment) not in factors:
        factors.clear()  # one at a time: it is as large as G
        factors[id(moment)] = inverse_factor(moment.gram())
    return factors[id(moment)]


def _better_gptq(
    weight_NK: torch.Tensor,
    moment: SecondMoment | None,
    options: Int4Options,
    factors: dict[int, torch.Tensor | None],
    rtn_loss: float,
) -> tuple[RoundedRows, float] | None:
    """GPTQ's rows and loss, if it was asked for, is possible, and loses less than round-to-nearest."""
    upper_KK = _factor(moment, factors) if options.algorithm == "gptq" else None
    if upper_KK is None or moment is None:
        return None
    asymmetric = options.format == "int4_gptq"
    rounded = _joined(
        [
            gptq_rows(weight_NK[rows], upper_KK, options.group_size, asymmetric=asymmetric)
            for rows in row_blocks(weight_NK)
        ]
    )
    loss = _loss(weight_NK, rounded, moment)
    return (rounded, loss) if loss < rtn_loss else None


def _joined(parts: Sequence[RoundedRows]) -> RoundedRows:
    return RoundedRows(
        torch.cat([part.codes_RK for part in parts]),
        torch.cat([part.scale_RG for part in parts]),
        torch.cat([part.zero_point_RG for part in parts]),
    )


def _loss(weight_NK: torch.Tensor, rounded: RoundedRows, moment: SecondMoment | None) -> float:
    if moment is None:
        return 0.0
    loss = 0.0
    for rows in row_blocks(weight_NK):
        part = RoundedRows(
            rounded.codes_RK[rows], rounded.scale_RG[rows], rounded.zero_point_RG[rows]
        )
        d_RK = part.dequantized(weight_NK.dtype).float().sub_(weight_NK[rows].float())
        loss += float(moment.row_losses(d_RK).double().sum())
    return loss


def _facts(
    name: str,
    linear: Any,
    statistics: InputStatistics | None,
    options: Int4Options,
    alpha: float | None,
    loss: float,
    rtn_loss: float,
) -> LinearFacts:
    """Sums become means; a loss that is not finite becomes an error."""
    num_tokens = 0 if statistics is None else statistics.num_tokens
    if not (loss < float("inf") and rtn_loss < float("inf")):  # NaN included
        raise StageError(
            Problem(
                name,
                f"the error of its output is {loss:g} ({rtn_loss:g} with round-to-nearest)",
                fix="check the weights and activations for very large values",
            )
        )
    algorithm, notes = options.algorithm, []
    if statistics is None:
        notes.append(NO_TOKENS)
        notes.append("it is rounded to nearest" if alpha is None else "it shares the others' scale")
        algorithm = "rtn" if alpha is None else algorithm
    elif alpha is not None and loss >= rtn_loss:
        notes.append("round-to-nearest would be better here, but not for all that share the scale")
    elif options.algorithm != "rtn" and loss >= rtn_loss:
        algorithm = "rtn"
        notes.append(f"{options.algorithm} was not better than round-to-nearest, which was kept")
    elif options.algorithm == "awq_clip" and alpha is None:
        notes.append("no scale was better than none; only clipped")
    count = num_tokens * len(linear.weight)
    return LinearFacts(
        format=options.format,
        algorithm=algorithm,
        alpha=None if alpha is None else round(alpha, 6),
        loss=loss / count if count else None,
        rtn_loss=rtn_loss / count if count else None,
        num_tokens=num_tokens,
        note="; ".join(notes),
    )
