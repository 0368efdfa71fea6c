"""Pre-quant scales move into the norm before the linears, where that norm feeds nothing else.

norm * scale is computed in float32 and rounded once, to the dtype of the norm; what is evaluated from
then on is the file. Measured on random layers, int4, 8 of 1024 channels 30 to 300 times the others:
rounding adds at most 0.1 % to the squared error of the outputs, for norms that multiply by w, and in
float16 also by 1 + w; 0.6 % for 1 + w in bfloat16, where small factors cancel (ModelOpt, which adds and
multiplies in bfloat16 itself: 2 %). Codes made for the rounded norm would save that, and nothing else.

Shape suffixes: K input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from pipeline.quant.packing.flow import norm_consumers
from pipeline.quant.packing.names import LayerNames

FOLDED_FORMATS = ("int4_awq", "w4a8_awq")
"""ModelOpt's layout keeps SmoothQuant's scales beside the weights."""

_LARGEST_CHANGE = 1 / 32
"""Where rounding the norm changes a factor by more (1 + w below 0.06 in bfloat16, an underflow of
float16), the scale stays beside the weight."""


@dataclass
class Folded:
    """What folding changed.

    Attributes:
        norms: full name of a tensor in memory -> what to store instead.
        linears: whose scale a norm took.
        behind_norms: all linears that alone read a norm, with or without a scale.
    """

    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    linears: set[str] = field(default_factory=set)
    behind_norms: set[str] = field(default_factory=set)


def fold_scales(mini: nn.Module, names: LayerNames, formats: Mapping[str, str]) -> Folded:
    """Fold what can be folded; `mini` is left as it is.

    Args:
        formats: linear (name within the layer) -> format.
    """
    consumers = norm_consumers(mini)
    folded = Folded(behind_norms={name for linears in consumers.values() for name in linears})
    inside = f"{names.inner}."
    for norm_name, linears in consumers.items():
        suffixes = [name.removeprefix(inside) for name in linears]
        if not norm_name.startswith(inside) or not all(
            formats.get(suffix) in FOLDED_FORMATS for suffix in suffixes
        ):
            continue
        scales_K = [pre_quant_scale(mini.get_submodule(name)) for name in sorted(linears)]
        first_K = scales_K[0]
        if first_K is None or not all(
            scale_K is not None and torch.equal(scale_K, first_K) for scale_K in scales_K
        ):
            continue
        source = names.source(norm_name.removeprefix(inside))
        offset = source.offset if source is not None else 0.0
        norm = mini.get_submodule(norm_name)
        stored = _stored_norm(norm, first_K.float(), offset)
        if stored:
            folded.norms |= {f"{norm_name}.{leaf}": tensor for leaf, tensor in stored.items()}
            folded.linears |= linears
    return folded


def _stored_norm(norm: nn.Module, scale_K: torch.Tensor, offset: float) -> dict[str, torch.Tensor]:
    """Weight and bias with the scale in them; nothing where rounding would change a factor too much."""
    assert isinstance(norm.weight, torch.Tensor)
    dtype = norm.weight.dtype
    wanted_K = (_values(norm.weight) + offset) * scale_K
    stored_K = (wanted_K - offset).to(dtype)
    change_K = (stored_K.float() + offset - wanted_K).abs()
    if not bool((change_K <= wanted_K.abs() * _LARGEST_CHANGE).all()):  # NaN and Inf are not folded
        return {}
    stored = {"weight": stored_K}
    if getattr(norm, "bias", None) is not None:
        stored["bias"] = (_values(norm.bias) * scale_K).to(dtype)
    return stored


def explicit_scale(name: str, linear: nn.Module, fmt: str, folded: Folded) -> torch.Tensor | None:
    """The scale [K] that is stored beside a linear, in its weight's dtype; None: no such tensor.

    Ones where the algorithm has none, but no norm feeds the linear either (o_proj, down_proj, experts):
    TensorRT-LLM's own reader of this layout (its PyTorch backend, linear.py of 1.2) wants the tensor
    there, and looks for none beside q, k, v and gate, up. Ones cost nothing in an engine.
    """
    assert isinstance(linear.weight, torch.Tensor)
    dtype = linear.weight.dtype
    scale_K = pre_quant_scale(linear)
    if scale_K is not None:
        return None if name in folded.linears else scale_K.to(dtype)
    if fmt not in FOLDED_FORMATS or name in folded.behind_norms:
        return None
    return torch.ones(linear.weight.shape[1], dtype=dtype)


def pre_quant_scale(linear: nn.Module) -> torch.Tensor | None:
    """The factors [K] of a linear's input channels, in their stored dtype; None: there are none."""
    quantizer = getattr(linear, "input_quantizer", None)
    scale = getattr(quantizer, "pre_quant_scale", None)
    return None if scale is None else scale.detach().reshape(-1)


def _values(parameter: object) -> torch.Tensor:
    assert isinstance(parameter, torch.Tensor)
    return parameter.detach().float()
