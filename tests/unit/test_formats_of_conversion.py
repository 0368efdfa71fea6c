"""FP8 of ModelOpt: converted as it is but for fused scales, planned where it runs, and built."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint import open_checkpoint, planned_bytes
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import SafetensorsWriter, TensorSpec
from pipeline.config import load_config
from pipeline.errors import CheckpointError
from pipeline.parallel import mappings
from pipeline.plan import make_plan
from pipeline.progress import SilentProgress
from pipeline.run import run
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder

SHARED = ("q_proj", "k_proj", "v_proj")


def as_fp8(source: Path, directory: Path) -> Path:
    """A checkpoint in ModelOpt's unified FP8 layout, with made-up scales; written by our writer, as
    the safetensors library for numpy has no float8."""
    directory.mkdir()
    (directory / "config.json").write_text((source / "config.json").read_text())
    tensors = {}
    for name, values in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = values
            continue
        module = name.removesuffix(".weight")
        scale = 0.01 if module.endswith(SHARED) else 0.02
        tensors[name] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = np.array(scale, np.float32)
        tensors[f"{module}.input_scale"] = np.array(0.5, np.float32)
    dtypes = {"float8_e4m3fn": "F8_E4M3", "float16": "F16", "float32": "F32"}
    specs = [TensorSpec(name, dtypes[str(x.dtype)], x.shape) for name, x in tensors.items()]
    with SafetensorsWriter(directory / "model.safetensors", specs) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    write_quant_config(directory)
    return directory


def write_quant_config(directory: Path) -> None:
    fields = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))


@pytest.mark.parametrize("tp", [1, 2])
def test_fp8(tiny_llama: Path, tmp_path: Path, tp: int) -> None:
    source = as_fp8(tiny_llama, tmp_path / "fp8")
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=1, progress=SilentProgress())
    hf, checkpoint = CheckpointReader(source), open_checkpoint(source)
    for mapping in mappings(tp, 1):
        path = out_dir / f"rank{mapping.rank}.safetensors"
        assert planned_bytes(checkpoint.shape, checkpoint.format, mapping) == path.stat().st_size
        rank = CheckpointReader(path)
        prefix = "transformer.layers.1.attention."
        for scale, value in (("weights_scaling_factor", 0.01), ("activation_scaling_factor", 0.5)):
            found = rank.read(f"{prefix}qkv.{scale}")
            assert (found.shape, found.dtype) == ((1,), np.float32)
            assert found[0] == np.float32(value)
        whole = hf.read("model.layers.1.self_attn.o_proj.weight").view(np.uint8)
        part = np.split(whole, tp, axis=1)[mapping.tp_rank]
        np.testing.assert_array_equal(rank.read(f"{prefix}dense.weight").view(np.uint8), part)
    config = json.loads((out_dir / "config.json").read_text())
    assert config["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }


class SaidProgress(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_fp8_of_q_k_and_v_is_rounded_to_the_largest_scale(tiny_llama: Path, tmp_path: Path) -> None:
    """TensorRT-LLM has one scale for the three, ModelOpt's unified layout one for each."""
    source = as_fp8(tiny_llama, tmp_path / "fp8")
    reader = CheckpointReader(source)
    prefix = "model.layers.0.self_attn."
    set_scale(reader, f"{prefix}k_proj.weight_scale", 0.013)
    set_scale(reader, f"{prefix}k_proj.input_scale", 0.75)
    (tmp_path / "out").mkdir()
    progress = SaidProgress()
    convert_checkpoint(source, tmp_path / "out", tp=1, pp=1, progress=progress)
    rank = CheckpointReader(tmp_path / "out" / "rank0.safetensors")
    qkv = "transformer.layers.0.attention.qkv."
    assert rank.read(f"{qkv}weights_scaling_factor") == np.float32(0.013)
    assert rank.read(f"{qkv}activation_scaling_factor") == np.float32(0.75)
    expected, exact = [], []
    for part, scale in (("q", 0.01), ("k", 0.013), ("v", 0.01)):
        codes = reader.read(f"{prefix}{part}_proj.weight").astype(np.float32)
        exact.append(codes * np.float32(scale))
        ratio = np.float32(scale) / np.float32(0.013)
        expected.append((codes * ratio).astype(ml_dtypes.float8_e4m3fn))
    found = rank.read(f"{qkv}weight")
    assert found.tobytes() == np.concatenate(expected).tobytes()
    # k is as it was; q and v are off by at most half a step of their new code, 1/16 of its value.
    assert found[128:192].tobytes() == reader.read(f"{prefix}k_proj.weight").tobytes()
    error = np.abs(found.astype(np.float32) * np.float32(0.013) - np.concatenate(exact))
    assert 0 < error.max() <= (np.abs(np.concatenate(exact)) / 16 + 0.013 * 2**-10).max()
    assert progress.said == [
        "2 FP8 weights are rounded to the scale of the largest weight that they are fused with: "
        "TensorRT-LLM has one scale for q, k and v"
    ]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_fp8_scales_must_be_usable(tiny_llama: Path, tmp_path: Path, scale: float) -> None:
    source = as_fp8(tiny_llama, tmp_path / "fp8")
    name = "model.layers.0.self_attn.v_proj.weight_scale"
    set_scale(CheckpointReader(source), name, scale)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    assert str(caught.value) == f"{name}: is {scale}; allowed: a scale: finite, above 0"


def set_scale(reader: CheckpointReader, name: str, value: float) -> None:
    tensor = reader.tensors[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize(
    ("backend", "target", "text"),
    [
        ("onnxruntime", "a10", ""),
        ("tensorrt_rtx", "l4", ""),
        (
            "tensorrt_rtx",
            "a10",
            "target: fp8 for a10 (SM86): fp8 needs SM89 or newer; allowed: rtx4090, l4, l40s, rtx5090",
        ),
    ],
)
def test_plan_knows_where_fp8_runs(tmp_path: Path, backend: str, target: str, text: str) -> None:
    config = write_build(
        tmp_path, fmt="fp8", backend=backend, target=target, build={"max_input_len": 32}
    )
    (tmp_path / "weights").rename(tmp_path / "plain")
    as_fp8(tmp_path / "plain", tmp_path / "weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).rename(tmp_path / "weights" / name)
    workspace = Workspace(tmp_path)
    plan = make_plan(load_config(config), workspace.store, workspace.digests())
    assert [step.stage.name for step in plan.steps[:2]] == ["fetch", "convert"]
    texts = [str(problem) for problem in plan.problems]
    assert len(texts) == bool(text), texts
    assert all(text in problem and "tiny.yaml:" in problem for problem in texts)


@pytest.mark.slow
def test_a_whole_build_from_fp8(tmp_path: Path) -> None:
    """Compared with the same weights, dequantized: only the rounding of inputs is left."""
    config = write_build(tmp_path, fmt="fp8")
    (tmp_path / "weights").rename(tmp_path / "plain")
    as_fp8(tmp_path / "plain", tmp_path / "weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).rename(tmp_path / "weights" / name)
    result = run(load_config(config), Workspace(tmp_path), Recorder())
    assert result.executed == ("fetch", "convert", "build", "verify", "serve")
    report = json.loads((result.engine_dir / "report.json").read_text())
    assert report["quant_algo"] == "FP8"
    assert report["original_quantized_by"] == "modelopt"
    assert 0 < report["mean_kl"] < 0.5
