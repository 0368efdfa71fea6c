"""Asymmetric int4 in the network: checked, fused by TensorRT-RTX, and found in its plan."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import BuildFacts, WorkerRequest, facts_path
from pipeline.engine.tensorrt_rtx import engine_path
from pipeline.errors import CheckpointError, GateError
from pipeline.network import BuildLimits, export_network
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama
from tests.unit.test_rtx_build import Built, prove, run

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank checkpoint with zero points."""
    root = tmp_path_factory.mktemp("asymmetric")
    plain = write_tiny_llama(root / "plain", hidden_size=256, intermediate_size=512)
    write_foreign(plain, root / "hf", method="awq")
    (root / "checkpoint").mkdir()
    convert_checkpoint(root / "hf", root / "checkpoint", tp=1, pp=1, progress=SilentProgress())
    return root / "checkpoint"


def refused(checkpoint: Path, out_dir: Path) -> str:
    out_dir.mkdir()
    with pytest.raises(CheckpointError) as caught:
        export_network(checkpoint, 0, out_dir, LIMITS, SilentProgress())
    return str(caught.value)


def test_zero_points_are_required_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    path = broken / "rank0.safetensors"
    tensors = load_file(path)
    del tensors["transformer.layers.0.mlp.fc.weights_zero_point"]
    name = "transformer.layers.0.mlp.gate.weights_zero_point"
    tensors[name] = np.ascontiguousarray(tensors[name][:, :2])
    save_file(tensors, path)
    text = refused(broken, tmp_path / "a")
    assert (
        "transformer.layers.0.mlp.fc.weights_zero_point: is missing; allowed: I8 [512, 4]" in text
    )
    assert f"{name}: is I8 [512, 2]; allowed: I8 [512, 4]" in text

    for algo, flag, allowed in (("W4A16_GPTQ", False, "True"), ("W4A16_AWQ", True, "False")):
        config = json.loads((checkpoint / "config.json").read_text())
        config["quantization"] |= {"quant_algo": algo, "has_zero_point": flag}
        (broken / "config.json").write_text(json.dumps(config))
        text = refused(broken, tmp_path / algo)
        assert f"has_zero_point is {flag}".lower() in text.lower()
        assert f"allowed: {allowed}".lower() in text.lower()


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed",
)
def test_the_int4_products_stay_fused_and_every_correction_is_proved(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "engine").mkdir()
    request = WorkerRequest("tensorrt_rtx", checkpoint, tmp_path / "engine", 0, "rtx4090", LIMITS)
    done = run(request)
    assert done.returncode == 0, done.stderr
    facts = BuildFacts.from_json(facts_path(tmp_path / "engine", 0).read_text())
    assert (facts.num_fused_quantized, facts.num_unfused_quantized, facts.num_fused_attention) == (
        10,
        0,
        2,
    )
    assert facts.proven_bytes is not None
    assert facts.proven_bytes / facts.weight_bytes > 0.99

    # One changed byte of one correction is noticed, and its group is named.
    tensors = load_file(checkpoint / "rank0.safetensors")
    module = "transformer.layers.1.mlp.proj"
    zero = tensors[f"{module}.weights_zero_point"][:, 5].astype(np.float16)
    scale = tensors[f"{module}.weights_scaling_factor"][:, 5].astype(np.float16)
    path = engine_path(tmp_path / "engine", 0)
    data = bytearray(path.read_bytes())
    stored = (zero * scale).tobytes()
    assert data.count(stored) == 1
    data[data.index(stored) + 100] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(GateError) as caught:
        prove(Built(checkpoint, tmp_path / "engine", facts), path)
    assert [problem.where for problem in caught.value.problems] == [
        f"{path}: {module}.weights_zero_point, group 5"
    ]
