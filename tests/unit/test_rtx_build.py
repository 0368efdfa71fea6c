"""Real TensorRT-RTX builds without a GPU, and that the checks notice what is wrong with them.

Every build runs in a process of its own, because the compiler keeps the first logger of a process.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.engine import BuildFacts, WorkerRequest, facts_path
from pipeline.engine.rtx_expected import expected_forms
from pipeline.engine.rtx_layers import check_layers
from pipeline.engine.rtx_plan import check_header, read_header
from pipeline.engine.rtx_weights import prove_weights
from pipeline.engine.tensorrt_rtx import engine_path
from pipeline.errors import ExitCode, GateError
from pipeline.network import BuildLimits
from pipeline.network.export import read_checkpoint_spec
from tests.rank_checkpoints import read_rank, write_random_rank, write_rank

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="TensorRT-RTX is not installed",
    ),
]

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)


class Built(NamedTuple):
    checkpoint: Path
    engine_dir: Path
    facts: BuildFacts

    @property
    def plan(self) -> Path:
        return engine_path(self.engine_dir, 0)

    def listing(self) -> str:
        return (
            (self.engine_dir / "rank0.tensorrt_rtx.log").read_text().partition("VERBOSE Layers:")[2]
        )


def run(request: WorkerRequest, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The worker, after `prelude` has changed something in its process."""
    main = "from pipeline.engine.worker import main\nsys.exit(main(sys.argv[1]))"
    code = f"import sys\n{prelude}\n{main}"
    command = [sys.executable, "-c", code, request.to_json()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build(quantized: bool, directory: Path, target: str = "rtx4090") -> Built:
    checkpoint = write_random_rank(directory / "checkpoint", quantized=quantized)
    engine_dir = directory / "engine"
    engine_dir.mkdir()
    done = run(WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, target, LIMITS))
    assert done.returncode == 0, done.stderr
    return Built(
        checkpoint, engine_dir, BuildFacts.from_json(facts_path(engine_dir, 0).read_text())
    )


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(True, tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(False, tmp_path_factory.mktemp("fp16"))


def prove(built: Built, plan: Path) -> None:
    spec = read_checkpoint_spec(built.checkpoint, 0, LIMITS)
    reader = CheckpointReader(built.checkpoint / "rank0.safetensors")
    forms = expected_forms(reader, spec, LIMITS.max_seq_len)
    prove_weights(plan, read_header(plan).weights, forms)


def test_an_int4_engine_is_fused_and_holds_every_weight(int4: Built) -> None:
    facts = int4.facts
    assert (facts.num_fused_quantized, facts.num_unfused_quantized, facts.num_fused_attention) == (
        10,
        0,
        2,
    )
    # All in the checkpoint, less the two pre-quant scales of ones, plus two rotary tables.
    assert len(read_rank(int4.checkpoint)) == 37
    assert facts.num_proven_tensors == 37
    assert facts.proven_bytes is not None
    assert facts.proven_bytes / facts.weight_bytes > 0.99
    assert facts.engine_bytes == int4.plan.stat().st_size
    assert re.fullmatch(r"tensorrt_rtx 1\.7\.\d+\.\d+", facts.compiler)


def test_an_fp16_engine_holds_every_weight(fp16: Built) -> None:
    facts = fp16.facts
    assert (facts.num_fused_quantized, facts.num_unfused_quantized, facts.num_fused_attention) == (
        0,
        0,
        2,
    )
    assert facts.num_proven_tensors == len(read_rank(fp16.checkpoint)) + 2
    assert facts.proven_bytes is not None
    assert facts.proven_bytes / facts.weight_bytes > 0.99


@pytest.mark.parametrize(
    ("target", "sm"), [("a100-80gb", 80), ("rtx3090", 86), ("l4", 89), ("rtx5090", 120)]
)
@pytest.mark.parametrize("quantized", [True, False], ids=["int4", "fp16"])
def test_every_compute_capability_of_the_support_table(
    tmp_path: Path, target: str, sm: int, quantized: bool
) -> None:
    built = build(quantized, tmp_path, target)
    assert read_header(built.plan).sms == (sm,)
    assert built.facts.num_fused_attention == 2
    assert built.facts.num_fused_quantized == (10 if quantized else 0)


def test_the_header_names_the_target(tmp_path: Path) -> None:
    built = build(True, tmp_path, target="rtx5090")
    version = built.facts.compiler.removeprefix("tensorrt_rtx ")
    assert read_header(built.plan).sms == (120,)
    with pytest.raises(GateError, match="was built for SM120; allowed: SM89"):
        check_header(built.plan, version, (89,))


@pytest.mark.parametrize("kind", ["weight", "weights_scaling_factor", "prequant_scaling_factor"])
def test_one_changed_byte_of_an_int4_linear_is_noticed(
    int4: Built, tmp_path: Path, kind: str
) -> None:
    name = f"transformer.layers.1.mlp.proj.{kind}"
    plan = tmp_path / "plan"
    shutil.copyfile(int4.plan, plan)
    tensor = read_rank(int4.checkpoint)[name]
    if kind == "weight":
        # Two inputs of one output per byte: the first row is output 0, the low nibbles here.
        stored = bytes((tensor[0, 0::2] & 15) | ((tensor[0, 1::2] & 15) << 4))
    else:
        stored = tensor.astype(np.float16).tobytes()
    data = bytearray(plan.read_bytes())
    assert data.count(stored) == 1
    data[data.index(stored) + len(stored) // 2] ^= 0x10
    plan.write_bytes(data)
    with pytest.raises(GateError) as caught:
        prove(int4, plan)
    assert str(caught.value) == (
        f"{plan}: {name}: is not in the engine's weights byte for byte; fix: build again"
    )


def test_one_changed_byte_of_joined_float16_weights_is_noticed(fp16: Built, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    shutil.copyfile(fp16.plan, plan)
    header = read_header(plan)
    gate = read_rank(fp16.checkpoint)["transformer.layers.0.mlp.gate.weight"]
    data = bytearray(plan.read_bytes())
    start = data.index(gate.T[5].tobytes(), header.weights.offset)
    data[start] ^= 1
    plan.write_bytes(data)
    with pytest.raises(GateError) as caught:
        prove(fp16, plan)
    assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == [
        "transformer.layers.0.mlp.fc.weight",
        "transformer.layers.0.mlp.gate.weight",
    ]


def test_swapped_tensors_are_noticed(int4: Built, tmp_path: Path) -> None:
    """An engine of another checkpoint of the same shapes is not this one's."""
    other = write_random_rank(tmp_path / "other", quantized=True, seed=1)
    with pytest.raises(GateError) as caught:
        prove(int4._replace(checkpoint=other), int4.plan)
    assert len(caught.value.problems) == 35


def test_a_truncated_plan_is_noticed(int4: Built, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    plan.write_bytes(int4.plan.read_bytes()[:-1])
    with pytest.raises(GateError, match="truncated or damaged; fix: build again"):
        read_header(plan)


def test_lengths_that_the_parser_dropped_fail_the_build(int4: Built, tmp_path: Path) -> None:
    prelude = (
        "from pipeline.engine import rtx_build\n"
        "rtx_build.lower_attention = lambda trt, network, num_layers: None"
    )
    request = WorkerRequest("tensorrt_rtx", int4.checkpoint, tmp_path, 0, "rtx4090", LIMITS)
    done = run(request, prelude)
    assert done.returncode == ExitCode.STAGE
    assert "WARNING: [RemoveDeadLayers] Input Tensor kv_lengths is unused" in done.stderr
    assert not facts_path(tmp_path, 0).exists()


def test_a_copied_cache_fails_the_build(int4: Built, tmp_path: Path) -> None:
    """Without the second part of the lowering the compiler copies the key cache in every step."""
    prelude = (
        "from pipeline.engine import rtx_lowering\n"
        "rtx_lowering._unscaled = lambda trt, tensor, makers, where: tensor"
    )
    request = WorkerRequest("tensorrt_rtx", int4.checkpoint, tmp_path, 0, "rtx4090", LIMITS)
    done = run(request, prelude)
    assert done.returncode == ExitCode.GATE
    for layer in (0, 1):
        assert f"past_key_{layer}: the whole cache is copied by" in done.stderr


def test_what_the_compiler_refuses_is_quoted(int4: Built, tmp_path: Path) -> None:
    """Turing has no int4; the guard that says so earlier is taken away here."""
    prelude = (
        "from pipeline import targets\n"
        "targets.TARGETS['turing'] = targets.Target('turing', 75, 2**34, 3e11)\n"
        "from pipeline.engine.tensorrt_rtx import TensorRtRtxBackend\n"
        "TensorRtRtxBackend.can_target = lambda *arguments: None"
    )
    request = WorkerRequest("tensorrt_rtx", int4.checkpoint, tmp_path, 0, "turing", LIMITS)
    done = run(request, prelude)
    assert done.returncode == ExitCode.STAGE
    assert "model contains HW-specific datatypes: int4" in done.stderr


def test_layers_of_another_network_are_noticed(int4: Built) -> None:
    spec = read_checkpoint_spec(int4.checkpoint, 0, LIMITS)
    listing = int4.listing()
    check_layers(listing, spec, "log")
    unfused = listing.replace("Datatype: Int4", "Datatype: Half")
    with pytest.raises(GateError) as caught:
        check_layers(unfused, spec, "log")
    assert [problem.what for problem in caught.value.problems] == [
        f"transformer.layers.{layer}.{module}: the int4 weight is not part of the matrix product"
        for layer in (0, 1)
        for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    ]
    split = listing.replace("_gemm_mha_v2", "softmax")
    with pytest.raises(GateError, match="became 0 fused attention kernels, expected 1"):
        check_layers(split, spec, "log")
    blind = listing.replace("Name: kv_lengths,", "Name: other,")
    with pytest.raises(GateError, match="kv_lengths: no layer reads it"):
        check_layers(blind, spec, "log")


def test_a_single_group_is_counted_as_unfused(tmp_path: Path) -> None:
    """TensorRT-RTX never fuses a scale per channel; hidden 256 with groups of 256 has only that."""
    checkpoint = write_random_rank(tmp_path / "checkpoint", quantized=True)
    tensors = read_rank(checkpoint)
    for name, tensor in list(tensors.items()):
        if name.endswith("weights_scaling_factor"):
            tensors[name] = tensor[:, ::2].copy()
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization"]["group_size"] = 256
    write_rank(checkpoint, tensors, config)
    engine_dir = tmp_path / "engine"
    engine_dir.mkdir()
    done = run(WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, "rtx4090", LIMITS))
    assert done.returncode == 0, done.stderr
    facts = BuildFacts.from_json(facts_path(engine_dir, 0).read_text())
    # proj has 512 inputs, two groups; the other four linears of each layer have one.
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (2, 8)
