"""TensorRT-RTX engines of every format: fused, and every weight found byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import BACKENDS, BuildFacts, WorkerRequest, facts_path
from pipeline.engine.rtx_layers import CompiledLayer, check_layers
from pipeline.errors import GateError
from pipeline.network import BuildLimits
from pipeline.network.export import read_checkpoint_spec
from pipeline.progress import SilentProgress
from pipeline.targets import TARGETS
from tests.made_up_codes import write_quantized
from tests.modelopt_exports import write_plain
from tests.rank_by_hand import LINEARS, write_random
from tests.tiny_models import TINY

pytest.importorskip("tensorrt_rtx_bindings")

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=16)
ALL = {
    "0.attention.qkv": "FP8",
    "0.attention.dense": "W8A8_SQ_PER_CHANNEL",
    "0.mlp.fc": "W8A8_SQ_PER_CHANNEL",
    "0.mlp.gate": "W4A16_AWQ",
    "0.mlp.proj": "W8A16",
    "1.attention.qkv": "W8A8_SQ_PER_CHANNEL",
    "1.attention.dense": "FP8",
    "1.mlp.fc": "FP8",
    "1.mlp.gate": "FP8",
}


def uniform(algorithm: str) -> dict[str, str]:
    return {f"0.{name}": algorithm for name in LINEARS}


def build(checkpoint: Path, engine_dir: Path, target: str) -> BuildFacts:
    engine_dir.mkdir()
    request = WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, target, LIMITS)
    command = [sys.executable, "-m", "pipeline.engine.worker", request.to_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return BuildFacts.from_json(facts_path(engine_dir, 0).read_text())


def test_all_formats_in_one_engine(tmp_path: Path) -> None:
    checkpoint = write_random(tmp_path / "checkpoint", ALL)
    facts = build(checkpoint, tmp_path / "engine", "rtx4090")
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (9, 0)
    assert facts.num_fused_attention == 2
    # 7 tables and norms, 10 weights, 5 vectors of scales, 4 pre-quant scales, 2 rotary tables.
    assert facts.num_proven_tensors == 28
    assert facts.proven_bytes is not None
    assert facts.proven_bytes / facts.weight_bytes > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "target"),
    [
        (algorithm, target)
        for algorithm, targets in {
            "W8A16": ("a100-80gb", "a10", "l4", "rtx5090"),
            "W8A8_SQ_PER_CHANNEL": ("a100-80gb", "a10", "l4", "rtx5090"),
            "FP8": ("l4", "rtx5090"),
        }.items()
        for target in targets
    ],
)
def test_each_format_for_each_gpu(tmp_path: Path, algorithm: str, target: str) -> None:
    checkpoint = write_random(tmp_path / "checkpoint", uniform(algorithm))
    facts = build(checkpoint, tmp_path / "engine", target)
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["fp8", "int8_sq", "int8_wo"])
@pytest.mark.parametrize("architecture", TINY)
def test_each_format_of_each_architecture(tmp_path: Path, architecture: str, fmt: str) -> None:
    plain = write_plain(architecture, tmp_path / "plain", num_hidden_layers=1)
    write_quantized(plain, tmp_path / "unified", fmt)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(tmp_path / "unified", checkpoint, tp=1, pp=1, progress=SilentProgress())
    facts = build(checkpoint, tmp_path / "engine", "rtx4090")
    assert facts.num_fused_quantized is not None
    assert facts.num_fused_quantized >= 4
    assert facts.num_unfused_quantized == 0


@pytest.mark.parametrize(
    ("fmt", "target", "message"),
    [
        (
            "fp8",
            "a10",
            "target: fp8 for a10 (SM86): fp8 needs SM89 or newer; allowed: rtx4090, l4, l40s, rtx5090; "
            "fix: quantize.format fp16, int4_awq, int8_sq, int8_wo, or build.backend: onnxruntime",
        ),
        (
            "w4a8_awq",
            "l4",
            "target: w4a8_awq for l4 (SM89): TensorRT-RTX has no product of int4 weights with fp8 inputs"
            "; fix: quantize.format fp16, int4_awq, fp8, int8_sq, int8_wo, or build.backend: "
            "onnxruntime",
        ),
    ],
)
def test_what_is_refused_says_what_would_work(fmt: str, target: str, message: str) -> None:
    problem = BACKENDS["tensorrt_rtx"].can_target(TARGETS[target], ["fp16", fmt])
    assert str(problem) == message


@pytest.mark.parametrize(
    ("algorithm", "constants", "inputs", "message"),
    [
        ("W8A16", ("Half",), ("Half",), "the int8 weight is not part of the matrix product"),
        ("FP8", ("FP8",), ("Half",), "the matrix product does not take its input as fp8"),
        ("FP8", ("Half",), ("FP8",), "the fp8 weight is not part of the matrix product"),
        (
            "W8A8_SQ_PER_CHANNEL",
            ("Int8", "Half"),
            ("Half",),
            "the matrix product does not take its input as int8",
        ),
    ],
)
def test_unfused_products_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    constants: tuple[str, ...],
    inputs: tuple[str, ...],
    message: str,
) -> None:
    spec = read_checkpoint_spec(
        write_random(tmp_path / "checkpoint", {"0.mlp.proj": algorithm}), 0, LIMITS
    )
    module = "transformer.layers.0.mlp.proj"
    product = CompiledLayer("p", "gemm", (), (), constants, (module,), inputs)
    monkeypatch.setattr("pipeline.engine.rtx_layers.parse_listing", lambda *_: [product])
    with pytest.raises(GateError) as caught:
        check_layers("", spec, "log")
    assert f"log: {module}: {message}" in str(caught.value).splitlines()
