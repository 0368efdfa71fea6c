"""Weight formats as a table: which tensors a weight becomes, and what each dimension follows.

Sources of the facts: ModelOpt 0.47 exports (unified Hugging Face layout and TensorRT-LLM checkpoint),
compared bit for bit in tests/parity/test_modelopt_export.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

GROUP: Final = "group"
GROUP_SIZES: Final = (64, 128)
"""What the int4 kernels of TensorRT-LLM take."""


@dataclass(frozen=True)
class StoredDim:
    """A dimension of a stored tensor follows dimension `parent` of the weight, divided by `divisor`."""

    parent: int
    divisor: int | Literal["group"] = 1


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that a weight becomes.

    Attributes:
        source: suffix of the name in the Hugging Face checkpoint.
        target: suffix of the name in the TensorRT-LLM checkpoint.
        source_dtypes: safetensors dtypes that are read, and converted to `target_dtype`.
        dims: None means: as the weight itself; () a number without dimensions, which the target has as
            [1]. A tensor that follows dimension 0 of the weight is joined along it when several weights
            are fused; one that does not must be the same for all.
        fill: the neutral value, written when the source has the tensor nowhere (a pre-quant scale that
            was folded into the norm before it, or that the algorithm does not use). None: required.
    """

    source: str
    target: str
    source_dtypes: tuple[str, ...]
    target_dtype: str
    dims: tuple[StoredDim, ...] | None = None
    fill: float | None = None


@dataclass(frozen=True)
class QuantFormat:
    """How the linears of the decoder layers are stored; everything else is `PLAIN`.

    Attributes:
        quant_algo: the name in hf_quant_config.json and in TensorRT-LLM's config.json; None: plain.
        tensors: what one linear of shape [out, in] becomes.
        group_size: consecutive input channels that share one scale; None: the format has no groups.
        has_zero_point: W = (code - zero_point) * scale instead of code * scale.
    """

    name: str
    quant_algo: str | None
    tensors: tuple[StoredTensor, ...]
    group_size: int | None = None
    has_zero_point: bool = False

    @property
    def made_by_modelopt(self) -> bool:
        """Whether ModelOpt's unified layout may hold it: quantized, and without zero points."""
        return self.quant_algo is not None and not self.has_zero_point

    def with_group_size(self, group_size: int) -> QuantFormat:
        """The same format with another group size."""
        assert self.group_size is not None, f"{self.name} has no groups"
        return replace(self, group_size=group_size)

    def divisor(self, dim: StoredDim) -> int:
        """Elements of the weight's dimension per stored element."""
        if dim.divisor != GROUP:
            return dim.divisor
        assert self.group_size is not None, f"{self.name} has no groups"
        return self.group_size


_FLOATS = ("F16", "BF16", "F32")

PLAIN: Final = (StoredTensor("weight", "weight", _FLOATS, "F16"),)

# Two's complement nibbles, rows 2i (low) and 2i+1 (high) of a column in one byte; no zero point.
_INT4: Final = (
    StoredTensor("weight", "weight", ("U8", "I8"), "I8", (StoredDim(0, 2), StoredDim(1))),
    StoredTensor(
        "weight_scale",
        "weights_scaling_factor",
        ("F32",),
        "F32",
        (StoredDim(0), StoredDim(1, GROUP)),
    ),
)
_PRE_QUANT_SCALE: Final = StoredTensor(
    "pre_quant_scale", "prequant_scaling_factor", _FLOATS, "F16", (StoredDim(1),), fill=1.0
)
_INPUT_SCALE: Final = StoredTensor("input_scale", "activation_scaling_factor", ("F32",), "F32", ())

FORMATS: Final[dict[str, QuantFormat]] = {
    "fp16": QuantFormat("fp16", None, PLAIN),
    # W = code * scale; the linear computes (x * pre_quant_scale) @ W^T.
    "int4_awq": QuantFormat("int4_awq", "W4A16_AWQ", (*_INT4, _PRE_QUANT_SCALE), group_size=128),
    # The same codes with a zero point per group: asymmetric AutoAWQ and GPTQ, both of which
    # TensorRT-LLM calls W4A16_GPTQ. It keeps them in the layout of one GPU family; here they stay as
    # neutral as int4_awq, and zero points stay integers, so nothing is rounded.
    "int4_gptq": QuantFormat(
        "int4_gptq",
        "W4A16_GPTQ",
        (
            *_INT4,
            StoredTensor(
                "weight_zero_point",
                "weights_zero_point",
                ("I8",),
                "I8",
                (StoredDim(0), StoredDim(1, GROUP)),
            ),
        ),
        group_size=128,
        has_zero_point=True,
    ),
    # int4_awq with scales of scales, and fp8 activations: W = code * scale, where scale / scale_2 fits
    # fp8; x is divided by input_scale.
    "w4a8_awq": QuantFormat(
        "w4a8_awq",
        "W4A8_AWQ",
        (
            *_INT4,
            StoredTensor("weight_scale_2", "weights_scaling_factor_2", ("F32",), "F32", ()),
            _PRE_QUANT_SCALE,
            _INPUT_SCALE,
        ),
        group_size=128,
    ),
    # One scale for a weight, one for its input.
    "fp8": QuantFormat(
        "fp8",
        "FP8",
        (
            StoredTensor("weight", "weight", ("F8_E4M3",), "F8_E4M3"),
            StoredTensor("weight_scale", "weights_scaling_factor", ("F32",), "F32", ()),
            _INPUT_SCALE,
        ),
    ),
    # SmoothQuant: a scale for each output channel, one for the smoothed input.
    "int8_sq": QuantFormat(
        "int8_sq",
        "W8A8_SQ_PER_CHANNEL",
        (
            StoredTensor("weight", "weight", ("I8",), "I8"),
            StoredTensor(
                "weight_scale", "weights_scaling_factor", ("F32",), "F32", (StoredDim(0),)
            ),
            _PRE_QUANT_SCALE,
            _INPUT_SCALE,
        ),
    ),
}

BUILDABLE: Final = ("fp16", "int4_awq", "int4_gptq")
"""Formats for which an engine can be built; the others can be converted."""
