"""Putting results into ModelOpt's modules, so that its fake quantization and its export functions
apply.

Scaled weights stay as ModelOpt leaves them: multiplied by the scale, not rounded, with the ranges that
were judged. Weights of GPTQ are left rounded: their codes are not the nearest ones.

Shape suffixes: N output features, K input features, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.model_calib import (
    enable_stats_collection,
    finish_stats_collection,
    max_calibrate,
    smoothquant,
)
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from torch import nn

KV_QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")


@contextlib.contextmanager
def only_cache_ranges(model: nn.Module) -> Iterator[None]:
    """While entered, no quantizer rounds anything, and those of keys and values collect their range."""
    enabled = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    ]
    cache = [module for name, module in enabled if name.endswith(KV_QUANTIZERS)]
    others = [module for name, module in enabled if not name.endswith(KV_QUANTIZERS)]
    for quantizer in others:
        quantizer.disable()
    for quantizer in cache:
        enable_stats_collection(quantizer)
    try:
        yield
    finally:
        for quantizer in cache:
            finish_stats_collection(quantizer)
        for quantizer in others:
            quantizer.enable()


def calibrate_weight(linear: Any) -> None:
    """ModelOpt's max calibration: ranges of the weight as it is now."""
    for part in linear.weight_quantizer.modules():
        if isinstance(part, TensorQuantizer):
            part.reset_amax()
    max_calibrate(linear, lambda _linear: None)


def calibrate_input(linear: Any, amax_K: torch.Tensor) -> None:
    """The range of an input of which only the largest |x| of each feature is known, scale included."""
    quantizer = linear.input_quantizer
    quantizer.reset_amax()
    enable_stats_collection(quantizer)
    quantizer(_as_input(linear, amax_K))
    finish_stats_collection(quantizer)


def smooth(linear: Any, amax_K: torch.Tensor) -> None:
    """ModelOpt's SmoothQuant of one linear."""
    smoothquant(linear, lambda module: module.input_quantizer(_as_input(module, amax_K)))


def _as_input(linear: Any, amax_K: torch.Tensor) -> torch.Tensor:
    return amax_K.to(linear.weight.dtype).view(1, 1, -1)


def set_input_scale(linear: Any, inverse_K: torch.Tensor, amax_K: torch.Tensor) -> None:
    """What the input is multiplied by before the (already multiplied) weight."""
    quantizer = linear.input_quantizer
    assert quantizer.pre_quant_scale is None, "the linear has a scale already"
    quantizer._enable_pre_quant_scale = True
    quantizer.pre_quant_scale = inverse_K
    # ModelOpt keeps this for whoever removes the scale again.
    quantizer._amax_for_smoothing = amax_K.to(linear.weight.dtype).cpu()


def set_int4_ranges(linear: Any, amax_NG: torch.Tensor) -> None:
    """Ranges [N, G] that were chosen, in place of those of the weight as it is now."""
    calibrate_weight(linear)
    quantizer = linear.weight_quantizer
    first = quantizer[0] if isinstance(quantizer, SequentialQuantizer) else quantizer
    shape = first.amax.shape
    first.reset_amax()
    first.amax = amax_NG.reshape(shape)


def share_weight_range(linears: list[Any]) -> None:
    """The largest of the per-tensor ranges for all: fused linears have one."""
    quantizers = [
        linear.weight_quantizer[-1]
        if isinstance(linear.weight_quantizer, SequentialQuantizer)
        else linear.weight_quantizer
        for linear in linears
    ]
    amax = torch.stack([quantizer.amax for quantizer in quantizers]).max()
    for quantizer in quantizers:
        quantizer.amax = amax
