"""Flags of trtllm-build: what goes together, what follows from what, and how it is written."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.build_config import BuildConfig
from pipeline.engine.trtllm_flags import BuildSubject, build_arguments, flag_notes, flag_problems
from pipeline.engine.trtllm_version import stages_problem, version_note, version_problem
from tests.trtllm_stand_in import FLAGS


def _subject(flags: dict[str, Any] | None = None, **changes: Any) -> BuildSubject:
    build = BuildConfig.model_validate({"backend": "tensorrt_llm", "tensorrt_llm": flags or {}})
    return BuildSubject(
        **{
            "build": build,
            "sm": 90,
            "format": "int4_awq",
            "parts": ("int4_awq",),
            "kv_cache": "fp16",
            "tp": 2,
            "world_size": 2,
            "architecture": "LlamaForCausalLM",
            **changes,
        }
    )


def _value(arguments: list[str], flag: str) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def test_the_command_line_of_an_awq_engine() -> None:
    arguments = build_arguments(_subject())
    for flag, value in {
        "--max_batch_size": "4",
        "--max_input_len": "512",
        "--max_seq_len": "1024",
        "--max_num_tokens": "4096",  # 4 rows of 1024, less than 8192
        "--tokens_per_block": "32",
        "--kv_cache_type": "paged",
        "--gemm_plugin": "auto",
        "--use_fused_mlp": "disable",
        "--use_paged_context_fmha": "enable",
        "--use_fp8_context_fmha": "disable",
        "--opt_num_tokens": None,
        "--logits_dtype": None,
    }.items():
        assert _value(arguments, flag) == value, flag
    assert "--strip_plan" not in arguments
    assert {word for word in arguments if word.startswith("--")} <= set(FLAGS.split())
    assert "auto_parallel" not in " ".join(arguments)


@pytest.mark.parametrize(
    ("format", "parts", "expected"),
    [
        ("fp16", ("fp16",), "enable"),
        ("fp8", ("fp8",), "enable"),
        ("mixed", ("fp16", "int4_awq"), "enable"),
        ("int8_sq", ("int8_sq",), "disable"),
        ("w4a8_awq", ("w4a8_awq",), "disable"),
    ],
)
def test_fused_mlp_follows_the_format(format: str, parts: tuple[str, ...], expected: str) -> None:
    arguments = build_arguments(_subject(format=format, parts=parts))
    assert _value(arguments, "--use_fused_mlp") == expected


def test_switches_and_choices_are_written() -> None:
    chosen = {"strip_plan": True, "logits_dtype": "float16", "opt_num_tokens": 64}
    arguments = build_arguments(_subject(chosen))
    assert "--strip_plan" in arguments
    assert _value(arguments, "--logits_dtype") == "float16"
    assert _value(arguments, "--opt_num_tokens") == "64"


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ({"use_fused_mlp": True}, {}, "use_fused_mlp: true, but the format is int4_awq"),
        (
            {"max_num_tokens": 5000},
            {},
            "max_num_tokens: 5000 is more than max_batch_size rows of max_seq_len tokens have "
            "(TensorRT-LLM 1.2, builder.py); allowed: at most 4096",
        ),
        (
            {"max_num_tokens": 20},
            {},
            "max_num_tokens: 20 is less than tokens_per_block (TensorRT-LLM 1.2, builder.py); "
            "allowed: 32 or more",
        ),
        (
            {"max_num_tokens": 100, "context_fmha": False},
            {},
            "max_num_tokens: 100 is less than max_input_len without context_fmha",
        ),
        ({"opt_num_tokens": 8000}, {}, "opt_num_tokens: 8000 is more than max_num_tokens"),
        (
            {"opt_num_tokens": 8, "multiple_profiles": True},
            {},
            "opt_num_tokens: each of multiple_profiles has an optimum of its own",
        ),
        (
            {"use_paged_context_fmha": True, "streamingllm": True},
            {},
            "use_paged_context_fmha: true, but streamingllm is on",
        ),
        (
            {"use_paged_context_fmha": True},
            {"kv_cache": "int8"},
            "use_paged_context_fmha: true, but the KV cache is int8",
        ),
        (
            {"use_paged_context_fmha": True, "use_fp8_context_fmha": False},
            {"kv_cache": "fp8"},
            "use_paged_context_fmha: true, but the KV cache is fp8 and use_fp8_context_fmha is off",
        ),
        (
            {"use_fp8_context_fmha": True},
            {"sm": 86},
            "use_fp8_context_fmha: true, but SM86 has no fp8 (TensorRT-LLM 1.2, plugin.py)",
        ),
        ({"gemm_swiglu_plugin": "fp8"}, {}, "gemm_swiglu_plugin: fp8, but the format is int4_awq"),
        (
            {"low_latency_gemm_plugin": "fp8"},
            {"sm": 100, "format": "fp8", "parts": ("fp8",)},
            "low_latency_gemm_plugin: fp8, which SM100 does not have",
        ),
        (
            {"weight_streaming": True},
            {},
            "weight_streaming: weights of a plugin do not stream, and gemm_plugin is auto",
        ),
        (
            {"fast_build": True},
            {"format": "int8_sq", "parts": ("int8_sq",)},
            "fast_build: true, but int8_sq has int8 products without a plugin",
        ),
        ({"reduce_fusion": True}, {"tp": 1}, "reduce_fusion: true, but tp is 1"),
        (
            {"reduce_fusion": True},
            {"architecture": "GPT2LMHeadModel"},
            "reduce_fusion: true, but not known for GPT2LMHeadModel",
        ),
        ({"user_buffer": True}, {}, "user_buffer: needs reduce_fusion"),
        ({"workers": 4}, {}, "workers: 4, but there are 2 rank(s) to build; allowed: at most 2"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    (problem,) = flag_problems(_subject(flags, **changes))
    assert str(problem).startswith(expected)


def test_what_is_legal_together() -> None:
    legal = {
        "reduce_fusion": True,
        "user_buffer": True,
        "workers": 2,
        "multiple_profiles": True,
        "max_num_tokens": 4096,
        "weight_streaming": True,
        "gemm_plugin": "disable",
    }
    assert list(flag_problems(_subject(legal))) == []
    assert list(flag_problems(_subject())) == []
    assert list(flag_notes(_subject())) == []


def test_paged_context_fmha_is_off_where_it_cannot_be() -> None:
    subject = _subject({"streamingllm": True})
    assert _value(build_arguments(subject), "--use_paged_context_fmha") == "disable"
    assert list(flag_notes(subject)) == [
        "no chunked prompts and no reuse of the KV cache: paged context FMHA is off (streamingllm "
        "is on)"
    ]


def test_notes() -> None:
    build = BuildConfig.model_validate(
        {
            "max_batch_size": 64,
            "tensorrt_llm": {
                "max_num_tokens": 32768,
                "remove_input_padding": False,
                "weight_streaming": True,
                "gemm_plugin": "disable",
                "gather_generation_logits": True,
                "strip_plan": True,
            },
        }
    )
    notes = " | ".join(flag_notes(_subject(build=build)))
    assert "max_num_tokens 32768: above 16384 trtllm-build warns" in notes
    assert "no in-flight batching: it needs remove_input_padding" in notes
    assert "int4 weights belong to a plugin and stay on the GPU" in notes
    assert "gather_generation_logits is deprecated" in notes
    assert "trtllm-refit must add the checkpoint's weights" in notes


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.16.0", "is older than 0.17"),
        ("0.17.0", None),
        ("0.17.0.dev2024121700", None),
        ("1.0.0rc6", None),
        ("1.2.1", None),
        ("1.3.0rc0", None),
        ("1.3.0rc20", None),
        ("1.3.0rc21", "has no trtllm-build for checkpoints any more: removed in July 2026"),
        ("1.3.0rc22.post1", "removed in July 2026"),
        ("1.3.0", "removed in July 2026"),
        ("1.4.0rc1", "removed in July 2026"),
        ("latest", "no version that is known"),
    ],
)
def test_versions(version: str, expected: str | None) -> None:
    problem = version_problem(version, "here")
    assert (problem is None) == (expected is None)
    if problem is not None and expected is not None:
        assert expected in problem.what
        assert problem.allowed == "0.17 up to, not including, 1.3"
        assert problem.fix == "use 1.2.1"


def test_a_deprecated_version_is_noted() -> None:
    assert version_note("1.2.1") is None
    note = version_note("1.3.0rc15")
    assert note == (
        "TensorRT-LLM 1.3.0rc15: trtllm-build is deprecated there; 1.2.1 is what is known"
    )
    assert "never on PyPI" in str(version_note("1.3.0rc16"))


def test_old_versions_drop_the_last_layers_of_uneven_stages() -> None:
    problem = stages_problem("0.21.0", 7, 2, "mapping.pp")
    assert problem is not None
    assert "drops the last 1 of 7 layers with pp 2" in problem.what
    assert stages_problem("1.2.1", 7, 2, "mapping.pp") is None
    assert stages_problem("0.21.0", 8, 2, "mapping.pp") is None


@pytest.mark.parametrize(
    ("environment", "ok"),
    [
        ("current", True),
        ({"venv": "../venvs/trtllm"}, True),
        ({"image": "registry.example/trtllm:1.2.1"}, True),
        ({"image": "trtllm@sha256:" + "0" * 64, "program": "podman"}, True),
        ({"image": "trtllm"}, False),
        ({"image": "trtllm:latest"}, False),
        ({"image": "trtllm:1.2.1 --privileged"}, False),
        ("elsewhere", False),
    ],
)
def test_environments(environment: object, ok: bool) -> None:
    section = {"tensorrt_llm": {"environment": environment}}
    if ok:
        BuildConfig.model_validate(section)
    else:
        with pytest.raises(ValidationError):
            BuildConfig.model_validate(section)
