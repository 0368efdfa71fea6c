"""FP8, W4A8 and INT8 SmoothQuant: converted as they are, refused by plan before a build is tried."""

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
from pipeline.workspace import Workspace
from tests.build_config import write_build

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


def test_fused_linears_must_share_a_scale(tiny_llama: Path, tmp_path: Path) -> None:
    source = as_fp8(tiny_llama, tmp_path / "fp8")
    reader = CheckpointReader(source)
    name = "model.layers.0.self_attn.k_proj.weight_scale"
    tensor = reader.tensors[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.float32(0.3).tobytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    assert str(caught.value) == (
        f"{name}: differs from {name.replace('k_proj', 'q_proj')}, but both become the one scale of a "
        "fused linear (transformer.layers.0.attention.qkv.weights_scaling_factor)"
    )


def test_plan_refuses_what_no_backend_builds(tmp_path: Path) -> None:
    config = write_build(tmp_path, fmt="int4_awq")
    (tmp_path / "weights").rename(tmp_path / "plain")
    as_fp8(tmp_path / "plain", tmp_path / "weights")
    workspace = Workspace(tmp_path)
    plan = make_plan(load_config(config), workspace.store, workspace.digests())
    texts = [str(problem) for problem in plan.problems]
    assert any(
        "quantize.format: the source is fp8, which is converted but not built; "
        "allowed: fp16, int4_awq, int4_gptq" in text
        for text in texts
    ), texts
