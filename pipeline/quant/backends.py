"""Which weight format runs where: one table of format, backend and compute capability (SM).

`plan`, the backends and the README's support section all ask it. "tensorrt_llm" is also what
becomes of a checkpoint that `build.backend: none` leaves: trtllm-build reads it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pipeline.quant.formats import FORMATS, KvCache

ONNXRUNTIME, TENSORRT_RTX, TENSORRT = "onnxruntime", "tensorrt_rtx", "tensorrt"
TENSORRT_LLM = "tensorrt_llm"
KNOWN_SMS: Final = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

_RTX_SMS: Final = (75, 80, 86, 89, 120, 121)
_COMPILED = "compiled with TensorRT-RTX 1.7.1 for each SM"
_BUILDER = "TensorRT-LLM 1.2: checks of builder.py and plugin.py"
_ALIKE = "as TensorRT-RTX 1.7.1 compiles; TensorRT itself was not tried"
_INT4 = ("int4_awq", "int4_gptq")


@dataclass(frozen=True)
class Refusal:
    """Why a format does not run somewhere.

    Attributes:
        reason: completes "<format> on SM<n>: ...".
        source: where that is known from.
    """

    reason: str
    source: str


@dataclass(frozen=True)
class _Rule:
    """Formats that a backend refuses below `lowest_sm` and on the SMs from `banned`."""

    backend: str
    formats: tuple[str, ...]
    reason: str
    source: str
    lowest_sm: int = 0
    banned: range = range(0)

    def refuses(self, sm: int) -> bool:
        return sm < self.lowest_sm or sm in self.banned


_ALWAYS = range(1000)
_BLACKWELL = range(100, 120)
_RULES: Final = (
    _Rule(TENSORRT_RTX, _INT4, "TensorRT-RTX has no int4 weight kernels below SM80", _COMPILED, 80),
    _Rule(
        TENSORRT_RTX,
        ("int8_sq",),
        "TensorRT-RTX has no int8 product with a float32 result below SM80",
        _COMPILED,
        80,
    ),
    _Rule(TENSORRT_RTX, ("fp8",), "fp8 needs SM89 or newer", _COMPILED, 89),
    _Rule(
        TENSORRT_RTX,
        ("w4a8_awq",),
        "TensorRT-RTX has no product of int4 weights with fp8 inputs",
        _COMPILED,
        banned=_ALWAYS,
    ),
    _Rule(TENSORRT, _INT4, "no int4 weight kernels are known below SM80", _ALIKE, 80),
    _Rule(TENSORRT, ("int8_sq",), "no int8 product with a float32 result below SM80", _ALIKE, 80),
    _Rule(TENSORRT, ("fp8",), "fp8 needs SM89 or newer", _ALIKE, 89),
    _Rule(
        TENSORRT,
        ("w4a8_awq",),
        "no product of int4 weights with fp8 inputs is known",
        _ALIKE,
        banned=_ALWAYS,
    ),
    _Rule(TENSORRT_LLM, ("fp8", "w4a8_awq"), "fp8 needs SM89 or newer", _BUILDER, 89),
    _Rule(
        TENSORRT_LLM,
        ("int4_awq", "w4a8_awq", "int8_wo"),
        "TensorRT-LLM refuses int4 and int8 weights on SM100 to SM119",
        _BUILDER,
        banned=_BLACKWELL,
    ),
    _Rule(
        TENSORRT_LLM,
        ("int8_sq",),
        "TensorRT-LLM refuses SmoothQuant on SM100 to SM119",
        _BUILDER,
        banned=_BLACKWELL,
    ),
    _Rule(
        TENSORRT_LLM,
        ("int4_gptq",),
        "zero points stay integers here; TensorRT-LLM loads them in the layout of one GPU only",
        "TensorRT-LLM 1.2: its loader of W4A16_GPTQ",
        banned=_ALWAYS,
    ),
    _Rule(
        TENSORRT_LLM,
        ("int8_wo",),
        "TensorRT-LLM takes int8 weights of W8A16 to be in the layout of one GPU already; ours are "
        "rows of the matrix, as ModelOpt's exporter writes them",
        "TensorRT-LLM 1.2: its loader of W8A16",
        banned=_ALWAYS,
    ),
)


def refusal(fmt: str, backend: str, sm: int) -> Refusal | None:
    """None if `backend` runs linears of format `fmt` on this SM, else why not; ask of each part of a
    mixed checkpoint."""
    if backend == ONNXRUNTIME:
        return None  # the host's CPU executes the network
    if backend == TENSORRT_RTX and sm not in _RTX_SMS:
        return Refusal(f"TensorRT-RTX 1.7 cannot compile for SM{sm}", _COMPILED)
    for rule in _RULES:
        if rule.backend == backend and fmt in rule.formats and rule.refuses(sm):
            return Refusal(rule.reason, rule.source)
    return None


def lm_head_refusal(fmt: str, backend: str, sm: int) -> Refusal | None:
    """The same for lm_head of a format that is not fp16."""
    if backend == TENSORRT_LLM and fmt != "fp8":
        return Refusal(
            "TensorRT-LLM quantizes lm_head as fp8 only",
            "TensorRT-LLM 0.19 to 1.2: quantize_lm_head of its quantize.py",
        )
    return refusal(fmt, backend, sm)


def kv_cache_refusal(kv_cache: KvCache, backend: str, sm: int) -> Refusal | None:
    """The same for a quantized KV cache."""
    if kv_cache == "fp16":
        return None
    if backend in (ONNXRUNTIME, TENSORRT_RTX, TENSORRT):
        return Refusal(
            "the engines built here keep their KV cache in fp16",
            "TensorRT-RTX 1.7.1 compiles no other cache",
        )
    if kv_cache == "fp8" and sm < 89:
        return Refusal("an fp8 KV cache needs SM89 or newer", _BUILDER)
    if kv_cache == "int8" and sm in _BLACKWELL:
        return Refusal("TensorRT-LLM refuses an int8 KV cache on SM100 to SM119", _BUILDER)
    return None


def formats_for(backend: str, sm: int, among: Iterable[str] = tuple(FORMATS)) -> tuple[str, ...]:
    """The formats of `among` that run there."""
    return tuple(name for name in among if refusal(name, backend, sm) is None)


def sms_for(fmt: str, backend: str) -> tuple[int, ...]:
    """Every known SM on which the backend runs the format."""
    return tuple(sm for sm in KNOWN_SMS if refusal(fmt, backend, sm) is None)
