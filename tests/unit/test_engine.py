"""Backends, the worker process, and the files they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine import (
    BACKENDS,
    RANK_BACKENDS,
    BuildFacts,
    WorkerRequest,
    facts_path,
    write_engine_config,
)
from pipeline.engine.onnxruntime_backend import check_forward
from pipeline.errors import CheckpointError, ExitCode, GateError, PlanError, ToolError
from pipeline.network import BuildLimits, export_network
from pipeline.progress import SilentProgress
from pipeline.targets import TARGETS, Target
from tests.rank_checkpoints import read_rank, write_random_rank, write_rank

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=16)


def work(backend: str, checkpoint: Path, out_dir: Path, target: str = "rtx4090") -> WorkerRequest:
    out_dir.mkdir(exist_ok=True)
    return WorkerRequest(backend, checkpoint, out_dir, 0, target, LIMITS)


def run_worker(request: WorkerRequest) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.engine.worker", request.to_json()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_requests_survive_json(tmp_path: Path) -> None:
    limits = BuildLimits(1, 20, 3, gather_context_logits=True)
    request = WorkerRequest("tensorrt_rtx", tmp_path / "a", tmp_path / "b", 3, "l4", limits)
    assert WorkerRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize("name", TARGETS)
def test_onnxruntime_takes_every_target(name: str) -> None:
    assert BACKENDS["onnxruntime"].can_target(TARGETS[name]) is None


@pytest.mark.parametrize(
    "name", ["a100-80gb", "a10", "rtx3090", "rtx4090", "l4", "l40s", "rtx5090"]
)
def test_tensorrt_rtx_takes_what_it_can_compile_for(name: str) -> None:
    assert BACKENDS["tensorrt_rtx"].can_target(TARGETS[name], ["int4_awq"]) is None


@pytest.mark.parametrize(
    ("name", "sm", "other"),
    [
        ("orin-agx-64gb", 87, "tensorrt, on the module itself"),
        ("h100-80gb", 90, "tensorrt_llm or tensorrt, on that GPU"),
    ],
)
def test_tensorrt_rtx_names_the_backend_for_other_gpus(name: str, sm: int, other: str) -> None:
    problem = BACKENDS["tensorrt_rtx"].can_target(TARGETS[name])
    assert str(problem) == (
        f"target: TensorRT-RTX 1.7 cannot compile for {name} (SM{sm}); allowed: a100-80gb, a10, "
        "rtx3090, rtx4090, l4, l40s, rtx5090; fix: build.backend: "
        f"{other} (elsewhere the run ends with a kit to build it there), or onnxruntime for the CPU"
    )


def test_turing_has_no_int4() -> None:
    turing = Target("t4", 75, 16 * 1024**3, 320e9)
    assert BACKENDS["tensorrt_rtx"].can_target(turing) is None
    problem = BACKENDS["tensorrt_rtx"].can_target(turing, ["fp16", "int4_awq"])
    assert problem is not None
    assert problem.what == (
        "int4_awq for t4 (SM75): TensorRT-RTX has no int4 weight kernels below SM80"
    )
    assert problem.fix == "quantize.format fp16, int8_wo, or build.backend: onnxruntime"


@pytest.mark.parametrize("head_size", [8, 12, 100, 264])
def test_tensorrt_rtx_has_no_attention_for_some_head_sizes(head_size: int) -> None:
    problem = BACKENDS["tensorrt_rtx"].head_size_problem(head_size)
    assert str(problem) == (
        f"head_size: TensorRT-RTX has no attention kernel for heads of {head_size} channels; "
        "allowed: multiples of 8, 16 to 256; fix: build.backend: onnxruntime"
    )
    assert BACKENDS["onnxruntime"].head_size_problem(head_size) is None


def test_tensorrt_rtx_takes_the_usual_head_sizes() -> None:
    backend = BACKENDS["tensorrt_rtx"]
    assert all(backend.head_size_problem(size) is None for size in (16, 24, 64, 80, 96, 128, 256))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_worker_builds_for_the_cpu(tmp_path: Path, quantized: bool) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=quantized)
    done = run_worker(work("onnxruntime", checkpoint, tmp_path / "engine"))
    assert done.returncode == 0, done.stderr
    text = facts_path(tmp_path / "engine", 0).read_text()
    assert done.stdout.endswith(text)
    facts = BuildFacts.from_json(text)
    assert (facts.backend, facts.rank) == ("onnxruntime", 0)
    assert facts.weight_bytes == (tmp_path / "engine/rank0.weights").stat().st_size
    assert facts.engine_bytes > facts.weight_bytes
    assert 20e6 < facts.peak_rss_bytes < 1e9
    assert {path.name for path in (tmp_path / "engine").iterdir()} == {
        "rank0.onnx",
        "rank0.trt.onnx",
        "rank0.weights",
        "rank0.facts.json",
    }


def test_the_worker_says_what_is_wrong_last(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
    tensors = read_rank(checkpoint)
    del tensors["lm_head.weight"]
    write_rank(checkpoint, tensors, json.loads((checkpoint / "config.json").read_text()))
    done = run_worker(work("onnxruntime", checkpoint, tmp_path / "engine"))
    assert done.returncode == ExitCode.CHECKPOINT
    assert done.stderr.splitlines()[-1].endswith(
        "lm_head.weight: is missing; allowed: F16 [300, 256]"
    )
    assert not facts_path(tmp_path / "engine", 0).exists()


def test_weights_that_give_no_number_fail_the_build(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
    tensors = read_rank(checkpoint)
    tensors["transformer.layers.1.mlp.proj.weight"][0, 0] = np.nan
    write_rank(checkpoint, tensors, json.loads((checkpoint / "config.json").read_text()))
    engine = tmp_path / "engine"
    engine.mkdir()
    export_network(checkpoint, 0, engine, LIMITS, SilentProgress())
    with pytest.raises(
        GateError, match="1200 of 1200 logits are not finite; fix: check the checkpoint"
    ):
        check_forward(engine, 0)


def test_a_refused_target_writes_nothing(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
    request = work("tensorrt_rtx", checkpoint, tmp_path / "engine", "h100-80gb")
    with pytest.raises(PlanError, match="cannot compile for h100-80gb"):
        RANK_BACKENDS["tensorrt_rtx"].build_rank(request, SilentProgress())
    assert list((tmp_path / "engine").iterdir()) == []


def test_tensorrt_rtx_wants_more_than_one_token_per_call(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
    limits = BuildLimits(max_batch_size=1, max_seq_len=8, max_input_len=1)
    request = WorkerRequest("tensorrt_rtx", checkpoint, tmp_path, 0, "l4", limits)
    with pytest.raises(PlanError) as caught:
        RANK_BACKENDS["tensorrt_rtx"].build_rank(request, SilentProgress())
    assert str(caught.value) == (
        "build limits: max_input_len is 1: TensorRT-RTX would not fuse attention; allowed: 2 or more"
    )


def test_a_missing_compiler_is_a_tool_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=False)
    request = WorkerRequest("tensorrt_rtx", checkpoint, tmp_path, 0, "rtx4090", LIMITS)
    with pytest.raises(ToolError, match=r"cannot be loaded.*pip install 'trtpipe\[rtx\]'"):
        RANK_BACKENDS["tensorrt_rtx"].build_rank(request, SilentProgress())


def test_the_engine_config_has_the_known_sections(tmp_path: Path) -> None:
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=True)
    write_engine_config(checkpoint, tmp_path, LIMITS)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "pretrained_config": json.loads((checkpoint / "config.json").read_text()),
        "build_config": {
            "max_batch_size": 2,
            "max_seq_len": 32,
            "max_input_len": 16,
            "gather_context_logits": False,
        },
    }
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        write_engine_config(tmp_path / "nothing", tmp_path, LIMITS)
