"""How much each format would cost each linear, measured without changing anything.

A loss is the squared error of the linear's output relative to the output's own energy tr(W G W^T), so
linears of all layers and sizes compare. The error of rounding the input, in formats that do so, is
measured on a few tokens and added: the two errors do not depend on each other.

Shape suffixes: T tokens, N output features, K input features, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from pipeline.quant.recipe import ALGORITHMS
from pipeline.quant.search.gptq import gptq_rows, inverse_factor, nearest_rows
from pipeline.quant.search.inputs import InputStatistics, gather_inputs, joint_range
from pipeline.quant.search.rounding import fp8_tensor, int4_nearest, int8_rows, row_blocks
from pipeline.quant.search.scale import ScaledWeight, scaled_difference, search_scale

_Weights = Mapping[str, torch.Tensor]
_Inputs = Mapping[str, InputStatistics]
_Difference = Callable[[str, torch.Tensor], torch.Tensor]
"""(linear, some of its rows [R, K]) -> what is computed minus what should be, float32 [R, K]."""


def linear_losses(
    mini: nn.Module,
    forward_loop: Callable[[nn.Module], None],
    formats: Sequence[str],
    linears: Sequence[str],
    *,
    group_size: int,
    algorithms: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """linear -> format -> relative squared error of its output, 0 to about 1; `mini` stays as it is.

    A linear that no calibration token reached has the loss of its weights: ||W' - W||^2 / ||W||^2.

    Args:
        mini: not quantized.
        formats: names of `ALGORITHMS`, or "fp16", which costs 0.
        linears: names within the layer, as in `LayerRecipe.formats`.
        algorithms: format -> how it is rounded; the format's usual way where it is missing. Clipping is
            left out of the estimate: "awq_clip" counts as "awq".

    Raises:
        StageError: an activation that is not finite; raised inside `forward_loop`.
    """
    modules = {
        linear: module
        for name, module in mini.named_modules()
        for linear in linears
        if name == linear or name.endswith(f".{linear}")
    }
    assert set(modules) == set(linears), set(linears) - set(modules)
    losses: dict[str, dict[str, float]] = {linear: {} for linear in linears}
    inputs = gather_inputs(mini, modules, forward_loop)
    with torch.no_grad():
        for names in inputs.sharing(list(linears)):
            group = {name: modules[name].weight.detach() for name in names}
            seen = {name: inputs.of[name] for name in names if name in inputs.of}
            for format_ in formats:
                way = (algorithms or {}).get(format_) or ALGORITHMS.get(format_, ("",))[0]
                found = _losses(group, seen, format_, way, group_size)
                for name, loss in found.items():
                    losses[name][format_] = loss
            for name in names:
                inputs.of.pop(name, None)
    return losses


def _losses(
    weights: _Weights, inputs: _Inputs, format_: str, algorithm: str, group_size: int
) -> dict[str, float]:
    if format_ == "fp16":
        return dict.fromkeys(weights, 0.0)
    inverse_K = None
    if format_ == "int8_sq" and inputs:
        difference, inverse_K = _smoothed(inputs)
    elif format_ in ("int8_wo", "int8_sq"):
        difference = _nearest(int8_rows)
    elif format_ == "fp8":
        amax = torch.stack([weight.abs().amax() for weight in weights.values()]).max().float()
        difference = _nearest(lambda w_RK: fp8_tensor(w_RK, amax))
    elif algorithm == "gptq" and inputs:
        difference = _fed_back(inputs, group_size, asymmetric=format_ == "int4_gptq")
    elif format_ == "int4_gptq":
        difference = _nearest(lambda w_RK: nearest_rows(w_RK, group_size).dequantized(w_RK.dtype))
    elif algorithm.startswith("awq") and inputs:
        difference, inverse_K = _scaled(weights, inputs, group_size)
    else:
        difference = _nearest(lambda w_RK: int4_nearest(w_RK, group_size))
    return {
        name: _relative(name, weight_NK, inputs.get(name), difference)
        + _input_loss(weight_NK, inputs.get(name), format_, inverse_K)
        for name, weight_NK in weights.items()
    }


def _nearest(rounding: Callable[[torch.Tensor], torch.Tensor]) -> _Difference:
    return lambda _name, w_RK: rounding(w_RK).float() - w_RK.float()


def _smoothed(inputs: _Inputs) -> tuple[_Difference, torch.Tensor]:
    """SmoothQuant as ModelOpt has it: every input feature has the range 1."""
    inverse_K = (1 / joint_range(inputs)).clamp(1e-4, 1e4)

    def difference(_name: str, w_RK: torch.Tensor) -> torch.Tensor:
        scaled_RK = (w_RK / inverse_K).to(w_RK.dtype)
        return int8_rows(scaled_RK).mul_(inverse_K).sub_(w_RK.float())

    return difference, inverse_K


def _scaled(
    weights: _Weights, inputs: _Inputs, group_size: int
) -> tuple[_Difference, torch.Tensor | None]:
    distinct = list({id(value): value for value in inputs.values()}.values())
    magnitude_K = torch.stack([value.magnitude_K for value in distinct]).sum(0)
    linears = [
        ScaledWeight(weight_NK, inputs[name].moment if name in inputs else None)
        for name, weight_NK in weights.items()
    ]
    num_tokens = sum(value.num_tokens for value in distinct)
    choice = search_scale(linears, magnitude_K / num_tokens, joint_range(inputs), group_size)

    def difference(_name: str, w_RK: torch.Tensor) -> torch.Tensor:
        return scaled_difference(w_RK, choice.scale_K, choice.inverse_K, group_size)

    return difference, choice.inverse_K


def _fed_back(inputs: _Inputs, group_size: int, *, asymmetric: bool) -> _Difference:
    factors: dict[int, torch.Tensor | None] = {}

    def difference(name: str, w_RK: torch.Tensor) -> torch.Tensor:
        statistics = inputs.get(name)
        upper_KK = None
        if statistics is not None:
            if id(statistics) not in factors:
                factors.clear()
                factors[id(statistics)] = inverse_factor(statistics.moment.gram())
            upper_KK = factors[id(statistics)]
        if upper_KK is not None:
            rounded = gptq_rows(w_RK, upper_KK, group_size, asymmetric=asymmetric)
        elif asymmetric:
            rounded = nearest_rows(w_RK, group_size)
        else:
            return int4_nearest(w_RK, group_size).sub_(w_RK.float())
        return rounded.dequantized(w_RK.dtype).float().sub_(w_RK.float())

    return difference


def _relative(
    name: str,
    weight_NK: torch.Tensor,
    statistics: InputStatistics | None,
    difference: _Difference,
) -> float:
    loss = energy = 0.0
    for rows in row_blocks(weight_NK):
        w_RK = weight_NK[rows]
        d_RK = difference(name, w_RK)
        for sign, values_RK in ((1, d_RK), (0, w_RK.float())):
            if statistics is None:
                total = float(values_RK.double().square().sum())
            else:
                total = float(statistics.moment.row_losses(values_RK).double().sum())
            loss, energy = loss + sign * total, energy + (1 - sign) * total
    return loss / energy if energy else 0.0


def _input_loss(
    weight_NK: torch.Tensor,
    statistics: InputStatistics | None,
    format_: str,
    inverse_K: torch.Tensor | None,
) -> float:
    """Relative squared error of the output when only the input is rounded, on the sampled tokens."""
    if statistics is None or format_ not in ("int8_sq", "fp8", "w4a8_awq"):
        return 0.0
    x_TK = torch.cat(statistics.samples).float()
    scale_K = torch.ones_like(statistics.amax_K) if inverse_K is None else inverse_K.float()
    amax = (statistics.amax_K * scale_K).max()
    scaled_TK = x_TK * scale_K
    if format_ == "int8_sq":
        step = (amax / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
        rounded_TK = (scaled_TK / step).round_().clamp_(-128.0, 127.0).mul_(step)
    else:
        rounded_TK = fp8_tensor(scaled_TK, amax)
    error_TK = (rounded_TK / scale_K).sub_(x_TK)
    loss = energy = 0.0
    for rows in row_blocks(weight_NK):
        w_RK = weight_NK[rows].float()
        loss += float((error_TK @ w_RK.t()).double().square().sum())
        energy += float((x_TK @ w_RK.t()).double().square().sum())
    return loss / energy if energy else 0.0
