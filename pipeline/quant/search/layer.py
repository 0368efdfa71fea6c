"""Quantize the linears of one decoder layer as a recipe says, with ModelOpt's quantizers.

The layer is inside a small model with an embedding, one decoder layer and a head; only that layer's
linears are touched. Afterwards the model is what ModelOpt calls quantized: it computes what the
exported layer will compute, and ModelOpt's export functions apply to it.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipeline.errors import Problem, StageError
from pipeline.quant.recipe import LayerRecipe, LinearFacts
from pipeline.quant.search.algorithm import FACTS
from pipeline.quant.search.modelopt_search import calibrate_with_modelopt

_CONFIGS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
}
"""Format -> ModelOpt's config of which the quantizers are taken."""

_KV_BITS: dict[str, Any] = {"fp8": (4, 3), "int8": 8}


def quantize_layer(
    mini: nn.Module, recipe: LayerRecipe, forward_loop: Callable[[nn.Module], None]
) -> dict[str, LinearFacts]:
    """Quantize in place; linear (as the recipe names it) -> what was found.

    Losses are those of the weights: rounding of inputs is not in them, nor what ModelOpt's fake
    quantization of w4a8_awq does to the dequantized codes.

    `int4_gptq` has zero points, which ModelOpt's quantizers do not know: such a linear gets the buffers
    `weight_scale_NG` (float32) and `weight_zero_point_NG` (int8), its weight is
    (code - zero point) * scale, and its quantizers are disabled.

    Args:
        mini: unquantized; modules are found by the end of their name.
        forward_loop: runs all calibration inputs through the model it gets; "gram" calls it once,
            "modelopt" as often as ModelOpt's algorithm wants. All of its tokens count: no padding.

    Raises:
        StageError: weights, activations or losses that are not finite, with the recipe's name of the
            linear. One about an activation passes through `forward_loop`, which may add the sample.
    """
    names = _full_names(mini, recipe)
    formats = {names[linear]: format_ for linear, format_ in _quantized(recipe).items()}
    config = {"quant_cfg": _quantizer_entries(recipe, formats), "algorithm": None}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # another one would round ModelOpt's alphas to itself
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # ModelOpt prints
            if recipe.search == "modelopt":
                found = calibrate_with_modelopt(mini, recipe, config, formats, forward_loop)
            else:
                found = _gram_search(mini, recipe, config, formats, forward_loop)
    except StageError as error:
        raise StageError(_renamed(error, names)) from error
    finally:
        torch.set_default_dtype(default)
    return {linear: found[name] for linear, name in names.items() if name in found}


def _renamed(error: StageError, names: dict[str, str]) -> list[Problem]:
    """Problems with the recipe's names: the layer's number in the small model means nothing."""
    shorter = {full: linear for linear, full in names.items()}
    problems = []
    for problem in error.problems:
        module, weight, rest = problem.where.partition(".weight")
        where = shorter.get(module, module) + weight + rest
        problems.append(replace(problem, where=where))
    return problems


def _gram_search(
    mini: nn.Module,
    recipe: LayerRecipe,
    config: dict[str, Any],
    formats: dict[str, str],
    forward_loop: Callable[[nn.Module], None],
) -> dict[str, LinearFacts]:
    import modelopt.torch.quantization as mtq

    plan = {name: (format_, recipe.algorithms[format_]) for name, format_ in formats.items()}
    algorithm = {"method": "awq_gram", "plan": plan, "group_size": recipe.group_size}
    mtq.quantize(mini, {**config, "algorithm": algorithm}, forward_loop)
    found = {}
    for name in formats:
        module = mini.get_submodule(name)
        found[name] = getattr(module, FACTS)
        delattr(module, FACTS)
    return found


def _quantized(recipe: LayerRecipe) -> dict[str, str]:
    return {linear: name for linear, name in recipe.formats.items() if name != "fp16"}


def _full_names(mini: nn.Module, recipe: LayerRecipe) -> dict[str, str]:
    """Linear of the recipe -> name of its module."""
    names = [name for name, module in mini.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    for linear in _quantized(recipe):
        ends = [name for name in names if name == linear or name.endswith(f".{linear}")]
        assert len(ends) == 1, f"{linear} is {ends} in the model"
        found[linear] = ends[0]
    return found


def _quantizer_entries(recipe: LayerRecipe, formats: dict[str, str]) -> list[dict[str, Any]]:
    """ModelOpt's `quant_cfg`: everything off, then each linear's quantizers by name."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, format_ in formats.items():
        if format_ == "int4_gptq":
            continue
        weight, inputs = _quantizers_of(format_, recipe.group_size)
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        if inputs is not None:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": inputs})
    if recipe.kv_cache != "fp16":
        cache = {"num_bits": _KV_BITS[recipe.kv_cache], "axis": None}
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cache})
    return entries


def _quantizers_of(format_: str, group_size: int) -> tuple[Any, Any]:
    """ModelOpt's settings for weight and input (None: not quantized), with our group size."""
    import modelopt.torch.quantization as mtq

    entries = getattr(mtq, _CONFIGS[format_])["quant_cfg"]
    settings = {
        entry["quantizer_name"]: copy.deepcopy(entry.get("cfg"))
        for entry in entries
        if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    }
    weight = settings["*weight_quantizer"]
    for part in weight if isinstance(weight, list) else [weight]:
        if part.get("block_sizes"):
            part["block_sizes"][-1] = group_size
    return weight, settings["*input_quantizer"]
