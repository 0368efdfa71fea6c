"""Weight formats as a table: which tensors a weight becomes, and what each dimension follows.

Sources of the facts: ModelOpt 0.47 exports (unified Hugging Face layout and TensorRT-LLM checkpoint),
compared bit for bit in tests/parity/test_modelopt_export.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

GROUP: Final = "group"
GROUP_SIZES: Final = (64, 128)
"""What the int4 kernels of TensorRT-LLM take."""

KvCache = Literal["fp16", "fp8", "int8"]
KV_CACHE_ALGOS: Final[dict[str, KvCache]] = {"FP8": "fp8", "INT8": "int8"}
"""Names in hf_quant_config.json and TensorRT-LLM's config.json, and ours."""


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
            are fused; one that does not must be the same for all, unless `largest`.
        fill: the neutral value, written when the source has the tensor nowhere (a pre-quant scale that
            was folded into the norm before it, or that the algorithm does not use). None: required.
        per_expert: a stack of experts has one for each; False: one for all, as they share their input.
        largest: of a number: linears that are joined take the largest of theirs; otherwise theirs must
            be equal.
        scaled_by: suffix of the number in the Hugging Face checkpoint that these codes are multiples
            of; codes of linears that are joined are rounded again where theirs is not the largest.
    """

    source: str
    target: str
    source_dtypes: tuple[str, ...]
    target_dtype: str
    dims: tuple[StoredDim, ...] | None = None
    fill: float | None = None
    per_expert: bool = True
    largest: bool = False
    scaled_by: str | None = None


@dataclass(frozen=True)
class QuantFormat:
    """How the linears of the decoder layers are stored; everything else is `PLAIN`.

    Attributes:
        quant_algo: the name in hf_quant_config.json and in TensorRT-LLM's config.json; None: plain.
        tensors: what one linear of shape [out, in] becomes.
        group_size: consecutive input channels that share one scale; None: the format has no groups.
        has_zero_point: W = (code - zero_point) * scale instead of code * scale.
        inputs: to what the linear's input is rounded; None: it is not.
        exceptions: linears that are stored otherwise, by their Hugging Face names without ".weight".
            In "mixed" they are all that is quantized, in another format they are what is not.
        kv_cache: of what format keys and values have scales; "fp16": they need none.
    """

    name: str
    quant_algo: str | None
    tensors: tuple[StoredTensor, ...]
    group_size: int | None = None
    has_zero_point: bool = False
    inputs: Literal["fp8", "int8"] | None = None
    exceptions: tuple[tuple[str, QuantFormat], ...] = ()
    kv_cache: KvCache = "fp16"

    @cached_property
    def _by_linear(self) -> dict[str, QuantFormat]:
        return dict(self.exceptions)

    @cached_property
    def usual(self) -> QuantFormat:
        """Of a linear that is no exception."""
        return FORMATS["fp16"] if self.is_mixed else replace(self, exceptions=(), kv_cache="fp16")

    @property
    def weights(self) -> Literal["fp16", "int4", "int8", "fp8"]:
        """What the elements of a weight are."""
        weight = self.tensors[0]
        if weight.target_dtype == "I8":
            return "int8" if weight.dims is None else "int4"
        return "fp8" if weight.target_dtype == "F8_E4M3" else "fp16"

    @property
    def is_mixed(self) -> bool:
        """Whether linears differ in more than being quantized or not."""
        return self.name == MIXED

    @cached_property
    def parts(self) -> tuple[QuantFormat, ...]:
        """Every format that a linear may have, the usual one first."""
        return tuple(dict.fromkeys((self.usual, *self._by_linear.values())))

    def of(self, linear: str) -> QuantFormat:
        """The format of one linear of the decoder layers, by its Hugging Face name without ".weight"."""
        return self._by_linear.get(linear, self.usual)

    def with_group_size(self, group_size: int) -> QuantFormat:
        """The same format with another group size."""
        assert self.group_size is not None, f"{self.name} has no groups"
        exceptions = tuple(
            (linear, fmt if fmt.group_size is None else fmt.with_group_size(group_size))
            for linear, fmt in self.exceptions
        )
        return replace(self, group_size=group_size, exceptions=exceptions)

    def with_exceptions(self, linears: Mapping[str, QuantFormat]) -> QuantFormat:
        """The same format with linears that are stored otherwise. A mixed one has the group size of
        those that have groups, the largest if they differ."""
        group_size = self.group_size
        if self.is_mixed:
            sizes = [fmt.group_size for fmt in linears.values() if fmt.group_size is not None]
            group_size = max(sizes, default=None)
        return replace(self, exceptions=tuple(linears.items()), group_size=group_size)

    def with_kv_cache(self, kv_cache: KvCache) -> QuantFormat:
        """The same format with scales for keys and values."""
        return replace(self, kv_cache=kv_cache)

    def divisor(self, dim: StoredDim) -> int:
        """Elements of the weight's dimension per stored element."""
        if dim.divisor != GROUP:
            return dim.divisor
        assert self.group_size is not None, f"{self.name} has no groups"
        return self.group_size


_FLOATS = ("F16", "BF16", "F32")

MIXED: Final = "mixed"

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
_INPUT_SCALE: Final = StoredTensor(
    "input_scale",
    "activation_scaling_factor",
    ("F32",),
    "F32",
    (),
    per_expert=False,
    largest=True,
)
# Codes -127..127, one scale for each output channel.
_INT8: Final = (
    StoredTensor("weight", "weight", ("I8",), "I8"),
    StoredTensor("weight_scale", "weights_scaling_factor", ("F32",), "F32", (StoredDim(0),)),
)

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
            # Only says how the scales are shared out between two factors.
            StoredTensor(
                "weight_scale_2", "weights_scaling_factor_2", ("F32",), "F32", (), largest=True
            ),
            _PRE_QUANT_SCALE,
            _INPUT_SCALE,
        ),
        group_size=128,
        inputs="fp8",
    ),
    # One scale for a weight, one for its input. ModelOpt gives q, k and v scales of their own in its
    # unified layout, of which TensorRT-LLM has one.
    "fp8": QuantFormat(
        "fp8",
        "FP8",
        (
            StoredTensor("weight", "weight", ("F8_E4M3",), "F8_E4M3", scaled_by="weight_scale"),
            StoredTensor(
                "weight_scale", "weights_scaling_factor", ("F32",), "F32", (), largest=True
            ),
            _INPUT_SCALE,
        ),
        inputs="fp8",
    ),
    # SmoothQuant: a scale for each output channel, one for the smoothed input.
    "int8_sq": QuantFormat(
        "int8_sq", "W8A8_SQ_PER_CHANNEL", (*_INT8, _PRE_QUANT_SCALE, _INPUT_SCALE), inputs="int8"
    ),
    "int8_wo": QuantFormat("int8_wo", "W8A16", _INT8),
    # Linears have formats of their own (`with_exceptions`); those without one are plain.
    MIXED: QuantFormat(MIXED, "MIXED_PRECISION", PLAIN),
}

MIXABLE: Final = ("fp16", "int4_awq", "w4a8_awq", "fp8", "int8_sq", "int8_wo")
"""What linears of a mixed checkpoint may be: what ModelOpt can write there."""
