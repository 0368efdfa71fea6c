"""The table of format, backend and compute capability, against what is published and was compiled."""

from __future__ import annotations

import pytest

from pipeline.quant.backends import formats_for, kv_cache_refusal, refusal, sms_for
from pipeline.quant.formats import FORMATS, MIXABLE, KvCache


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("sm", [75, 80, 87, 90, 100, 121])
def test_the_cpu_runs_everything_whatever_the_target(fmt: str, sm: int) -> None:
    assert refusal(fmt, "onnxruntime", sm) is None


@pytest.mark.parametrize(
    ("fmt", "sms"),
    [
        ("fp16", (75, 80, 86, 89, 120, 121)),
        ("int4_awq", (80, 86, 89, 120, 121)),
        ("int4_gptq", (80, 86, 89, 120, 121)),
        ("int8_wo", (75, 80, 86, 89, 120, 121)),
        ("int8_sq", (80, 86, 89, 120, 121)),
        ("fp8", (89, 120, 121)),
        ("w4a8_awq", ()),
    ],
)
def test_what_tensorrt_rtx_compiled(fmt: str, sms: tuple[int, ...]) -> None:
    assert sms_for(fmt, "tensorrt_rtx") == sms


@pytest.mark.parametrize(
    ("fmt", "sm", "reason"),
    [
        ("fp8", 86, "fp8 needs SM89 or newer"),
        ("w4a8_awq", 80, "fp8 needs SM89 or newer"),
        ("int4_awq", 100, "TensorRT-LLM refuses int4 and int8 weights on SM100 to SM119"),
        ("w4a8_awq", 110, "TensorRT-LLM refuses int4 and int8 weights on SM100 to SM119"),
        ("int8_sq", 103, "TensorRT-LLM refuses SmoothQuant on SM100 to SM119"),
        ("fp8", 90, None),
        ("int4_awq", 90, None),
        ("int4_awq", 120, None),
        ("int8_sq", 89, None),
    ],
)
def test_what_tensorrt_llm_refuses(fmt: str, sm: int, reason: str | None) -> None:
    found = refusal(fmt, "tensorrt_llm", sm)
    assert (None if found is None else found.reason) == reason
    assert found is None or "TensorRT-LLM 1.2" in found.source


@pytest.mark.parametrize("fmt", ["int4_gptq", "int8_wo"])
def test_tensorrt_llm_cannot_load_layouts_of_ours(fmt: str) -> None:
    assert sms_for(fmt, "tensorrt_llm") == ()


@pytest.mark.parametrize(
    ("backend", "sm", "formats"),
    [
        ("tensorrt_rtx", 86, ("fp16", "int4_awq", "int8_sq", "int8_wo")),
        ("tensorrt_rtx", 89, ("fp16", "int4_awq", "fp8", "int8_sq", "int8_wo")),
        ("tensorrt_rtx", 90, ()),
        ("tensorrt_llm", 100, ("fp16", "fp8")),
        ("onnxruntime", 86, MIXABLE),
    ],
)
def test_what_may_be_mixed(backend: str, sm: int, formats: tuple[str, ...]) -> None:
    assert formats_for(backend, sm, MIXABLE) == formats


@pytest.mark.parametrize(
    ("kv_cache", "backend", "sm", "runs"),
    [
        ("fp16", "tensorrt_rtx", 89, True),
        ("fp8", "tensorrt_rtx", 89, False),
        ("int8", "onnxruntime", 89, False),
        ("fp8", "tensorrt_llm", 86, False),
        ("fp8", "tensorrt_llm", 89, True),
        ("int8", "tensorrt_llm", 100, False),
        ("int8", "tensorrt_llm", 86, True),
    ],
)
def test_quantized_caches(kv_cache: KvCache, backend: str, sm: int, runs: bool) -> None:
    assert (kv_cache_refusal(kv_cache, backend, sm) is None) is runs
