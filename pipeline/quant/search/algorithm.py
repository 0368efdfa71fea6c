"""Our search as a calibration algorithm of ModelOpt: `algorithm={"method": "awq_gram"}`.

Importing this module registers it. One forward pass gathers the inputs of all linears and the ranges of
keys and values; everything after it works on weights and second moments. Each linear keeps a
`LinearFacts` as attribute `search_facts`, as ModelOpt's own searches do with `debug`.

Shape suffixes: N output features, K input features, R rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
from modelopt.torch.quantization.nn import SequentialQuantizer
from modelopt.torch.quantization.utils import is_quantized_linear
from pydantic import Field
from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.recipe import LinearFacts
from pipeline.quant.search.inputs import (
    InputStatistics,
    LayerInputs,
    expert_of,
    gather_inputs,
    joint_range,
)
from pipeline.quant.search.int4 import NO_TOKENS, Int4Options, quantize_int4
from pipeline.quant.search.modules import (
    calibrate_input,
    calibrate_weight,
    only_cache_ranges,
    share_weight_range,
    smooth,
)
from pipeline.quant.search.rounding import fp8_tensor, int8_rows, row_blocks
from pipeline.quant.search.scale import ALPHA_STEP

FACTS = "search_facts"
INT4_FORMATS = ("int4_awq", "int4_gptq", "w4a8_awq")


class GramSearchConfig(QuantizeAlgorithmConfig):  # type: ignore[misc]
    """Fields of the algorithm.

    Attributes:
        plan: linear -> (format, algorithm). Empty: every linear with enabled 4 bit weights, "awq".
        group_size: input features that share a scale; None: as the weight quantizers have it.
        joint: one scale for linears that read the same tensor. False: as ModelOpt's awq_lite searches.
        alpha_step: grid of alphas.
        exhaustive: measure every alpha on every row.
    """

    method: Literal["awq_gram"] = "awq_gram"
    plan: dict[str, tuple[str, str]] = Field(default_factory=dict)
    group_size: int | None = None
    joint: bool = True
    alpha_step: float = ALPHA_STEP
    exhaustive: bool = False


def gram_search(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], None],
    plan: dict[str, tuple[str, str]],
    group_size: int | None = None,
    joint: bool = True,
    alpha_step: float = ALPHA_STEP,
    exhaustive: bool = False,
    **_other: Any,
) -> None:
    """Calibrate every linear of `plan`; see `GramSearchConfig`.

    Raises:
        StageError: weights, activations or losses that are not finite.
    """
    modules = dict(model.named_modules())
    plan = plan or dict.fromkeys(_int4_linears(model), ("int4_awq", "awq"))
    linears = {name: modules[name] for name in plan}
    _refuse_not_finite(linears)
    with only_cache_ranges(model):
        inputs = gather_inputs(model, linears, forward_loop)
    with torch.no_grad():
        for names in _groups(plan, inputs, joint=joint):
            format_, algorithm = plan[names[0]]
            members = {name: linears[name] for name in names}
            seen = {name: inputs.of[name] for name in names if name in inputs.of}
            if format_ in INT4_FORMATS:
                size = group_size or _int4_quantizer(linears[names[0]]).block_sizes[-1]
                options = Int4Options(format_, algorithm, size, alpha_step, exhaustive)
                facts = quantize_int4(members, seen, options)
                if format_ == "w4a8_awq":
                    _range_inputs(members, seen)
                    _share_ranges(members)
            else:
                facts = _quantize_8_bits(members, seen, format_, algorithm)
            for name, found in facts.items():
                setattr(linears[name], FACTS, found)
            _forget(names, inputs)


def _refuse_not_finite(linears: dict[str, Any]) -> None:
    problems = [
        Problem(f"{name}.weight", "holds values that are not finite", fix="check the checkpoint")
        for name, linear in linears.items()
        if not math.isfinite(float(linear.weight.detach().sum(dtype=torch.float64)))
    ]
    if problems:
        raise StageError(problems)


def _int4_linears(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if is_quantized_linear(module) and module.weight_quantizer.is_enabled:
            first = _int4_quantizer(module)
            if first.num_bits == 4 and first.block_sizes:
                yield name


def _int4_quantizer(linear: Any) -> Any:
    quantizer = linear.weight_quantizer
    return quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer


def _groups(
    plan: dict[str, tuple[str, str]], inputs: LayerInputs, *, joint: bool
) -> list[list[str]]:
    """Linears that are quantized together: one input (or all experts), one format and algorithm."""
    if not joint:
        return [[name] for name in plan]
    groups: list[list[str]] = []
    for sharing in inputs.sharing(list(plan)):
        by_way: dict[tuple[str, str], list[str]] = {}
        for name in sharing:
            by_way.setdefault(plan[name], []).append(name)
        groups.extend(by_way.values())
    return groups


def _forget(names: list[str], inputs: LayerInputs) -> None:
    """Free the second moments that nobody needs any more."""
    for name in names:
        inputs.of.pop(name, None)


def _range_inputs(linears: dict[str, Any], inputs: dict[str, InputStatistics]) -> None:
    """The range of the input; an expert without tokens takes the others'."""
    if inputs:
        amax_K = joint_range(inputs)
        for linear in linears.values():
            calibrate_input(linear, amax_K)


def _share_ranges(linears: dict[str, Any]) -> None:
    """Linears of one expert (or outside experts) that read the same tensor are fused."""
    fused: dict[str, list[Any]] = {}
    for name, linear in linears.items():
        fused.setdefault(expert_of(name), []).append(linear)
    for members in fused.values():
        share_weight_range(members)


def _quantize_8_bits(
    linears: dict[str, Any],
    inputs: dict[str, InputStatistics],
    format_: str,
    algorithm: str,
) -> dict[str, LinearFacts]:
    originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    if format_ == "int8_sq" and inputs:
        for linear in linears.values():
            smooth(linear, joint_range(inputs))
    else:
        for linear in linears.values():
            calibrate_weight(linear)
    if format_ == "fp8":
        _range_inputs(linears, inputs)
        _share_ranges(linears)
    return {
        name: _facts_8_bits(linear, originals[name], inputs.get(name), format_, algorithm)
        for name, linear in linears.items()
    }


def _facts_8_bits(
    linear: Any,
    original_NK: torch.Tensor,
    statistics: InputStatistics | None,
    format_: str,
    algorithm: str,
) -> LinearFacts:
    """Losses are those of rounding the weight; that of rounding the input is not in them."""
    num_tokens = 0 if statistics is None else statistics.num_tokens
    loss = rtn_loss = None
    moment = None if statistics is None else statistics.moment
    if moment is not None:
        loss = rtn_loss = 0.0
        inverse_K = linear.input_quantizer.pre_quant_scale
        for rows in row_blocks(original_NK):
            w_RK = original_NK[rows]
            rounded_RK = _round_8_bits(linear, linear.weight.detach()[rows], format_)
            if inverse_K is not None:
                rounded_RK.mul_(inverse_K.float())
            plain_RK = _round_8_bits(linear, w_RK, format_)
            loss += float(moment.row_losses(rounded_RK.sub_(w_RK.float())).double().sum())
            rtn_loss += float(moment.row_losses(plain_RK.sub_(w_RK.float())).double().sum())
        count = num_tokens * len(original_NK)
        loss, rtn_loss = loss / count, rtn_loss / count
    return LinearFacts(
        format=format_,
        algorithm=algorithm,
        alpha=None,
        loss=loss,
        rtn_loss=rtn_loss,
        num_tokens=num_tokens,
        note="" if num_tokens else NO_TOKENS,
    )


def _round_8_bits(linear: Any, w_RK: torch.Tensor, format_: str) -> torch.Tensor:
    if format_ == "fp8":
        return fp8_tensor(w_RK, linear.weight_quantizer.amax.float())
    return int8_rows(w_RK)


@CalibrateModeRegistry.register_mode
class GramSearchMode(BaseCalibrateModeDescriptor):  # type: ignore[misc]
    """Tells ModelOpt of the algorithm."""

    @property
    def config_class(self) -> type[GramSearchConfig]:
        """The fields it takes."""
        return GramSearchConfig

    _calib_func = gram_search
