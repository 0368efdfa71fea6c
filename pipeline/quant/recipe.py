"""What is to be done with the linears of one decoder layer: a plain description, read by all who do it.

Nothing heavy is imported, so `plan` may use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

ALGORITHMS: Final[dict[str, tuple[str, ...]]] = {
    "int4_awq": ("awq", "awq_clip", "gptq", "rtn"),
    "int4_gptq": ("gptq", "rtn"),
    "w4a8_awq": ("awq", "awq_clip", "rtn"),
    "int8_wo": ("rtn",),
    "int8_sq": ("smoothquant",),
    "fp8": ("max",),
}
"""Formats that are made of plain weights, and how each can be rounded; the first is the usual one."""


@dataclass(frozen=True)
class LayerRecipe:
    """How one decoder layer is quantized.

    Attributes:
        formats: linear -> format; Hugging Face names within the layer, without ".weight", such as
            "self_attn.q_proj". A linear that is not in it, or has "fp16", stays as it is. All linears
            that are fused in TensorRT-LLM (q, k and v) have one format.
        algorithms: format -> one of its ALGORITHMS.
        group_size: input features that share a scale, in formats with groups.
        search: "gram": scales from Gram matrices, one for all linears that share an input.
            "modelopt": ModelOpt's own search, averaged over such linears when exported.
        kv_cache: "fp8" and "int8" also measure the range of keys and values.
    """

    formats: Mapping[str, str]
    algorithms: Mapping[str, str]
    group_size: int
    search: Literal["gram", "modelopt"] = "gram"
    kv_cache: Literal["fp16", "fp8", "int8"] = "fp16"


@dataclass(frozen=True)
class LinearFacts:
    """What quantizing one linear found.

    Attributes:
        format: how it is stored.
        algorithm: what was really done; "rtn" when AWQ was not better, `note` says so.
        alpha: exponent of the activation statistic in AWQ's scale; None: no such scale.
        loss: mean squared error of the linear's output over the calibration tokens.
        rtn_loss: the same of round-to-nearest in the same format.
        num_tokens: that reached it; 0 for an expert that the router never chose.
        note: in words, what a reader of the report must know; empty if all was as usual.
    """

    format: str
    algorithm: str
    alpha: float | None
    loss: float | None
    rtn_loss: float | None
    num_tokens: int
    note: str = ""
