"""What an engine does to the inputs of linears whose format rounds them: fp8, w4a8_awq, int8_sq.

With dequantized weights alone a model of such a format looks better than the engine will be.

Shape suffixes: T tokens (of all dimensions but the last), K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.tensor_reader import TensorReader

_FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = 448.0
_LOWEST_INT8, _HIGHEST_INT8 = -128, 127


def simulate_inputs(module: nn.Module, reader: TensorReader, prefix: str) -> int:
    """Round the inputs of a module's linears as the checkpoint's `input_scale` tensors say.

    Adds a forward hook to each module that has such a tensor. The linear's weight must be dequantized
    (`dequantized`: pre-quant scale multiplied into it); the hook scales the input, rounds it, and
    takes the scale out again. Codes are fp8 e4m3 (saturating) where the weight is fp8 or int4, -128 to
    127 where it is int8.

    Args:
        prefix: of the module's names in the checkpoint, such as "model.layers.3.".

    Returns:
        How many linears round their inputs.
    """
    found = 0
    for name, linear in module.named_modules():
        stored = f"{prefix}{name}"
        if f"{stored}.input_scale" in reader.tensors:  # also of GPT-2's Conv1D modules
            linear.register_forward_pre_hook(_rounding(reader, stored))
            found += 1
    return found


def _rounding(reader: TensorReader, name: str) -> Callable[[nn.Module, Any], Any]:
    smoothing_K = torch.ones(1)
    if f"{name}.pre_quant_scale" in reader.tensors:
        values_K = reader.read(f"{name}.pre_quant_scale").astype(np.float32)
        smoothing_K = torch.from_numpy(values_K)
    step_K = float(reader.read(f"{name}.input_scale")) / smoothing_K
    # Packed int4 may be I8 too, but has a scale for each group.
    has_row_scales = len(reader.tensors[f"{name}.weight_scale"].shape) == 1
    round_codes = _round_int8 if has_row_scales else _round_fp8

    def hook(_linear: nn.Module, args: Any) -> Any:
        x_TK, *rest = args
        on_device_K = step_K.to(x_TK.device)
        return (round_codes(x_TK.float() / on_device_K) * on_device_K).to(x_TK.dtype), *rest

    return hook


def _round_fp8(codes_TK: torch.Tensor) -> torch.Tensor:
    return codes_TK.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(_FP8).float()


def _round_int8(codes_TK: torch.Tensor) -> torch.Tensor:
    return codes_TK.round().clamp(_LOWEST_INT8, _HIGHEST_INT8)
