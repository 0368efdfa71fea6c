"""Export of a rank checkpoint: what is refused, what is written, and that it is streamed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.errors import CheckpointError, PlanError, StageError
from pipeline.network import (
    BuildLimits,
    cpu_graph_path,
    export_network,
    tensorrt_graph_path,
    weights_path,
)
from pipeline.network.rank_tensors import float16_scale
from pipeline.network.spec_reader import read_spec
from pipeline.network.weights_file import ALIGNMENT, WeightsFile
from pipeline.progress import SilentProgress
from tests.rank_checkpoints import read_rank, write_random_rank, write_rank

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=16)


def export(checkpoint: Path, out_dir: Path, **options: Any) -> Path:
    out_dir.mkdir(exist_ok=True)
    export_network(checkpoint, 0, out_dir, LIMITS, SilentProgress(), **options)
    return out_dir


def change(checkpoint: Path, out_dir: Path, edit: Any) -> Path:
    """A copy of a checkpoint whose tensors went through `edit` (in place)."""
    tensors = read_rank(checkpoint)
    edit(tensors)
    write_rank(out_dir, tensors, json.loads((checkpoint / "config.json").read_text()))
    return out_dir


@pytest.fixture(scope="module")
def fp16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_rank(tmp_path_factory.mktemp("fp16"), quantized=False)


@pytest.fixture(scope="module")
def int4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_rank(tmp_path_factory.mktemp("int4"), quantized=True)


@pytest.fixture(scope="module")
def int4_network(int4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(int4_checkpoint, tmp_path_factory.mktemp("int4-network"))


# --- limits and config ---------------------------------------------------------------------------


def test_every_bad_limit_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        BuildLimits(max_batch_size=0, max_seq_len=8, max_input_len=9)
    assert str(caught.value).splitlines() == [
        "build limits: max_batch_size is 0; allowed: 1 or more",
        "build limits: max_input_len is 9, max_seq_len is 8; allowed: max_input_len <= max_seq_len",
    ]


def test_a_config_lists_all_its_problems() -> None:
    config = {
        "architecture": "LlamaForCausalLM",
        "residual_mlp": True,
        "dtype": "bfloat16",
        "hidden_size": 0,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 10,
        "position_embedding_type": "alibi",
        "rotary_scaling": {"rope_type": "yarn", "factor": 2.0},
        "qk_layernorm": True,
        "mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"},
    }
    with pytest.raises(CheckpointError) as caught:
        read_spec(config, "config.json")
    assert str(caught.value).splitlines() == [
        "config.json: hidden_size is 0; allowed: an integer, 1 or more",
        "config.json: dtype is 'bfloat16'; allowed: float16",
        "config.json: quantization: kv_cache_quant_algo is 'FP8'; allowed: null",
        "config.json: mapping: world_size is 3, but tp_size 2 x pp_size 1 is 2; allowed: 2",
        "config.json: max_position_embeddings is None; allowed: an integer, 1 or more",
        "config.json: quantization: quant_algo is 'NVFP4'; allowed: null, W4A16_AWQ, W4A16_GPTQ, "
        "W4A8_AWQ, FP8, W8A8_SQ_PER_CHANNEL, W8A16, MIXED_PRECISION",
        "config.json: residual_mlp is True; allowed: False",
        "config.json: hidden_act is missing; allowed: silu, swiglu",
        "config.json: qk_layernorm is True; allowed: False",
        "config.json: position_embedding_type is 'alibi'; allowed: rope_gpt_neox",
        "config.json: rotary_scaling of type 'yarn'; allowed: none, linear, dynamic, llama3",
    ]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("mapping", [1], "mapping is [1]; allowed: null, a mapping"),
        ("quantization", "int4", "quantization is 'int4'; allowed: null, a mapping"),
        ("rotary_scaling", 2.0, "rotary_scaling is 2.0; allowed: null, a mapping"),
        ("head_size", 0, "head_size is 0; allowed: an integer, 1 or more"),
        ("num_key_value_heads", "2", "num_key_value_heads is '2'; allowed: an integer, 1 or more"),
        (
            "quantization",
            {"quant_algo": "W4A16_AWQ", "group_size": 0},
            "quantization: group_size is 0; allowed: an integer, 1 or more",
        ),
        ("norm_epsilon", -1e-5, "norm_epsilon is -1e-05; allowed: a number above 0"),
        ("rotary_base", "1e4", "rotary_base is '1e4'; allowed: a number above 0"),
    ],
)
def test_each_wrong_field_is_named(tmp_path: Path, name: str, value: object, line: str) -> None:
    checkpoint = write_random_rank(tmp_path, quantized=False, config={name: value})
    with pytest.raises(CheckpointError) as caught:
        read_spec(json.loads((checkpoint / "config.json").read_text()), "here")
    assert str(caught.value) == f"here: {line}"


def test_a_config_must_be_an_object(fp16_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a JSON object"):
        export(tmp_path, tmp_path / "out")


def test_a_rank_beyond_the_mapping_is_named(fp16_checkpoint: Path, tmp_path: Path) -> None:
    limits = BuildLimits(1, 8, 8)
    with pytest.raises(CheckpointError, match=r"mapping: there is no rank 1; allowed: 0 to 0"):
        export_network(fp16_checkpoint, 1, tmp_path, limits, SilentProgress())


def test_promised_biases_must_be_there(fp16_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((fp16_checkpoint / "config.json").read_text()) | {"attn_bias": True}
    write_rank(tmp_path / "c", read_rank(fp16_checkpoint), config)
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "c", tmp_path / "out")
    assert len(caught.value.problems) == 4  # qkv and dense of two layers
    assert "layers.0.attention.qkv.bias: is missing; allowed: F16 [512]" in str(caught.value)


def test_heads_must_fit(tmp_path: Path) -> None:
    config = {"num_key_value_heads": 3, "head_size": 33}
    checkpoint = write_random_rank(tmp_path, quantized=False, config=config)
    with pytest.raises(CheckpointError) as caught:
        read_spec(json.loads((checkpoint / "config.json").read_text()), "here")
    assert str(caught.value).splitlines() == [
        "here: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        "here: 33 rotated channels of heads of 33; allowed: an even number, at most the head size",
    ]


@pytest.mark.parametrize("factor", [None, 0, -1.0, True, "8"])
def test_a_scaling_needs_a_factor(tmp_path: Path, factor: object) -> None:
    config = {"rotary_scaling": {"type": "linear", "factor": factor}}
    checkpoint = write_random_rank(tmp_path, quantized=False, config=config)
    with pytest.raises(
        CheckpointError, match=r"rotary_scaling: factor is .*; allowed: a number above 0"
    ):
        read_spec(json.loads((checkpoint / "config.json").read_text()), "here")


def test_sequences_longer_than_the_model_are_refused(fp16_checkpoint: Path, tmp_path: Path) -> None:
    limits = BuildLimits(max_batch_size=1, max_seq_len=257, max_input_len=1)
    with pytest.raises(CheckpointError, match=r"257 is above .*max_position_embeddings 256"):
        export_network(fp16_checkpoint, 0, tmp_path, limits, SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        export(tmp_path / "nothing", tmp_path / "out")


# --- tensors -------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed_and_nothing_is_written(
    fp16_checkpoint: Path, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        del tensors["transformer.ln_f.weight"]
        tensors["transformer.layers.0.mlp.fc.weight"] = np.zeros((512, 128), np.float16)
        tensors["transformer.layers.1.mlp.gate.weight"] = np.zeros((512, 256), np.float32)
        tensors["transformer.layers.0.attention.q_layernorm.weight"] = np.ones(64, np.float16)

    checkpoint = change(fp16_checkpoint, tmp_path / "checkpoint", edit)
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, tmp_path / "out")
    lines = {line.partition("safetensors: ")[2] for line in str(caught.value).splitlines()}
    assert lines == {
        "transformer.ln_f.weight: is missing; allowed: F16 [256]",
        "transformer.layers.0.mlp.fc.weight: is F16 [512, 128]; allowed: F16 [512, 256]",
        "transformer.layers.1.mlp.gate.weight: is F32 [512, 256]; allowed: F16 [512, 256]",
        "transformer.layers.0.attention.q_layernorm.weight: is not used by the network; "
        "fix: remove it",
    }
    assert list((tmp_path / "out").iterdir()) == []


def test_groups_must_divide(int4_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((int4_checkpoint / "config.json").read_text())
    config["quantization"]["group_size"] = 96
    write_rank(tmp_path / "checkpoint", read_rank(int4_checkpoint), config)
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert len(caught.value.problems) == 10
    assert "256 inputs are not a multiple of 96, as int4_awq needs" in str(caught.value)


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan])
def test_a_scale_beyond_float16_is_refused(
    int4_checkpoint: Path, tmp_path: Path, value: float
) -> None:
    name = "transformer.layers.1.mlp.proj.weights_scaling_factor"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name][3, 1] = value

    checkpoint = change(int4_checkpoint, tmp_path / "checkpoint", edit)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: int4 scale .*at most 65504"):
        export(checkpoint, tmp_path / "out")


def test_a_vanishing_scale_becomes_zero() -> None:
    rounded = float16_scale(np.array([[1e-12, 0.5]], np.float32), "here")
    np.testing.assert_array_equal(rounded, np.array([[0.0, 0.5]], np.float16))


def test_int4_data_reads_back_through_onnx(int4_checkpoint: Path, int4_network: Path) -> None:
    """onnx's own reader of packed INT4 must see the values of ModelOpt's packing, transposed."""
    module = "transformer.layers.1.mlp.proj"
    packed = read_rank(int4_checkpoint)[f"{module}.weight"]
    low = np.left_shift(packed, 4).astype(np.int8) >> 4
    values_NK = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
    values_NK[0::2], values_NK[1::2] = low, packed >> 4
    model = onnx.load(str(cpu_graph_path(int4_network, 0)))
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    weight_KN = onnx.numpy_helper.to_array(arrays[f"{module}.weight"]).astype(np.int8)
    np.testing.assert_array_equal(weight_KN, values_NK.T)
    scale_GN = onnx.numpy_helper.to_array(arrays[f"{module}.weights_scaling_factor"])
    expected = read_rank(int4_checkpoint)[f"{module}.weights_scaling_factor"].T
    np.testing.assert_array_equal(scale_GN, expected.astype(np.float16))


def test_the_known_bytes_of_modelopts_packing(int4_checkpoint: Path, tmp_path: Path) -> None:
    """Rows 0 and 1 of column k are 1 and 7: byte 0x71 in the checkpoint; -2 and -7: 0x9E."""
    name = "transformer.layers.0.attention.dense.weight"

    def edit(tensors: dict[str, Any]) -> None:
        tensors[name].view(np.uint8)[0, :2] = (0x71, 0x9E)

    network = export(change(int4_checkpoint, tmp_path / "c", edit), tmp_path / "out")
    model = onnx.load(str(cpu_graph_path(network, 0)))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight_KN = onnx.numpy_helper.to_array(tensor).astype(np.int8)
    assert weight_KN[:2, :2].tolist() == [[1, 7], [-2, -7]]


@pytest.mark.parametrize("quantized", [False, True])
def test_both_graphs_are_valid_and_share_one_aligned_file(tmp_path: Path, quantized: bool) -> None:
    checkpoint = write_random_rank(tmp_path / "c", quantized=quantized)
    network = export(checkpoint, tmp_path / "out")
    assert {path.name for path in network.iterdir()} == {
        "rank0.onnx",
        "rank0.trt.onnx",
        "rank0.weights",
    }
    size = weights_path(network, 0).stat().st_size
    places: dict[str, set[tuple[int, int]]] = {}
    for path in (cpu_graph_path(network, 0), tensorrt_graph_path(network, 0)):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.external_data:
                fields = {entry.key: entry.value for entry in tensor.external_data}
                offset, length = int(fields["offset"]), int(fields["length"])
                assert fields["location"] == "rank0.weights"
                assert offset % ALIGNMENT == 0
                assert offset + length <= size
                places.setdefault(tensor.name, set()).add((offset, length))
            else:
                assert len(tensor.SerializeToString()) < 200, tensor.name
    assert all(len(place) == 1 for place in places.values())


def test_float16_tensors_are_stored_once_as_they_are(fp16_checkpoint: Path, tmp_path: Path) -> None:
    network = export(fp16_checkpoint, tmp_path / "out")
    data = weights_path(network, 0).read_bytes()
    for name, tensor in read_rank(fp16_checkpoint).items():
        assert data.count(tensor.tobytes()) == 1, name


def test_a_pre_quant_scale_of_ones_costs_nothing(int4_network: Path) -> None:
    model = onnx.load(str(cpu_graph_path(int4_network, 0)), load_external_data=False)
    scaled = {node.name for node in model.graph.node if node.name.endswith(".input")}
    modules = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")  # not mlp.gate: ones
    assert scaled == {
        f"transformer.layers.{layer}.{module}.input" for layer in (0, 1) for module in modules
    }


def test_padding_rows_of_the_vocabulary_get_no_logit(fp16_checkpoint: Path, tmp_path: Path) -> None:
    network = export(fp16_checkpoint, tmp_path / "out", vocab_size=290)
    for path in (cpu_graph_path(network, 0), tensorrt_graph_path(network, 0)):
        model = onnx.load(str(path), load_external_data=False)
        logits = next(value for value in model.graph.output if value.name == "logits")
        assert logits.type.tensor_type.shape.dim[2].dim_value == 290
    with pytest.raises(CheckpointError, match="301 tokens; allowed: 1 to vocab_size 300"):
        export(fp16_checkpoint, tmp_path / "other", vocab_size=301)


def test_rows_beyond_vocab_size_are_padding(fp16_checkpoint: Path, tmp_path: Path) -> None:
    """convert_checkpoint flows pad lm_head and keep the true vocab_size in config.json."""

    def edit(tensors: dict[str, Any]) -> None:
        for name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
            tensors[name] = np.pad(tensors[name], ((0, 20), (0, 0)))

    network = export(change(fp16_checkpoint, tmp_path / "c", edit), tmp_path / "out")
    model = onnx.load(str(cpu_graph_path(network, 0)), load_external_data=False)
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert dims["lm_head.weight"] == [300, 256]


def test_a_shared_embedding_is_stored_once(fp16_checkpoint: Path, tmp_path: Path) -> None:
    tensors = read_rank(fp16_checkpoint)
    del tensors["lm_head.weight"]
    config = json.loads((fp16_checkpoint / "config.json").read_text())
    write_rank(tmp_path / "untied", tensors, config)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is missing"):
        export(tmp_path / "untied", tmp_path / "out")
    write_rank(tmp_path / "tied", tensors, config | {"share_embedding_table": True})
    network = export(tmp_path / "tied", tmp_path / "tied-out")
    model = onnx.load(str(cpu_graph_path(network, 0)), load_external_data=False)
    names = [tensor.name for tensor in model.graph.initializer]
    assert "lm_head.weight" not in names
    onnx.checker.check_model(str(cpu_graph_path(network, 0)), full_check=True)


def test_int4_products_fuse_in_onnx_runtime(int4_network: Path, tmp_path: Path) -> None:
    """Float16 scales behind a cast must not cost the fusion: five products per layer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(cpu_graph_path(int4_network, 0)), options, providers=["CPUExecutionProvider"]
    )
    optimized = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False)
    ops = [node.op_type for node in optimized.graph.node]
    assert ops.count("MatMulNBits") == 10
    assert ops.count("MatMul") == 1  # lm_head
    assert "DequantizeLinear" not in ops


# --- streaming, weights file, imports ------------------------------------------------------------


def test_export_never_holds_the_model(tmp_path: Path) -> None:
    """Tables of 2 x 50 MB go through in blocks of 16 MiB."""
    vocab = 100_000
    checkpoint = write_random_rank(tmp_path / "c", quantized=True, config={"vocab_size": vocab})
    tensors = read_rank(checkpoint)
    for name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
        tensors[name] = np.zeros((vocab, 256), np.float16)
    write_rank(checkpoint, tensors, json.loads((checkpoint / "config.json").read_text()))
    del tensors
    tracemalloc.start()
    export(checkpoint, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert weights_path(tmp_path / "out", 0).stat().st_size > 100e6
    assert peak < 40e6  # seen: 34 MB, the block being written and the next


def test_a_weights_file_aligns_and_counts(tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights") as file:
        first = file.add("a", "float16", (3,), [np.arange(3, dtype=np.float16)])
        second = file.add(
            "b", "int4", (2, 3), [np.array([1, 2], np.uint8), np.array([3], np.uint8)]
        )
        with pytest.raises(AssertionError):
            file.add("c", "float32", (2,), [np.zeros(1, np.float32)])
    assert (first.offset, first.nbytes) == (0, 6)
    assert (second.offset, second.nbytes) == (4096, 3)
    data = (tmp_path / "weights").read_bytes()
    assert data[4096:4099] == b"\x01\x02\x03"
    assert not any(data[6:4096])


def test_existing_files_are_not_overwritten(fp16_checkpoint: Path, tmp_path: Path) -> None:
    export(fp16_checkpoint, tmp_path)
    with pytest.raises(StageError, match=r"rank0\.weights: cannot be written: File exists"):
        export(fp16_checkpoint, tmp_path)


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("wb", buffering=0) as full:
        file = WeightsFile(Path("/dev/full"))
        file._file = full
        with pytest.raises(StageError, match="/dev/full: cannot be written: No space left"):
            file.add("a", "float16", (3,), [np.zeros(3, np.float16)])


def test_importing_the_packages_is_light() -> None:
    code = (
        "import sys, pipeline.network, pipeline.engine, pipeline.engine.onnxruntime\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx_bindings', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
