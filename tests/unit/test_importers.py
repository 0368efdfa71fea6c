"""AutoAWQ and GPTQ: every weight that convert writes means exactly what the source means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import check_checkpoint, convert_checkpoint
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import CheckpointError
from pipeline.parallel import Mapping
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import Linear, write_foreign

# Target module of a rank file <- source modules.
TARGETS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def dequantize(tensors: dict[str, Any], module: str) -> np.ndarray:
    """A linear of a rank file in float64, from the description of the format."""
    packed = tensors[f"{module}.weight"].view(np.uint8)
    codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.float64)
    codes[0::2], codes[1::2] = packed % 16, packed // 16
    codes[codes > 7] -= 16
    scale = tensors[f"{module}.weights_scaling_factor"].astype(np.float64)
    zero = tensors.get(f"{module}.weights_zero_point", np.zeros_like(scale)).astype(np.float64)
    group = codes.shape[1] // scale.shape[1]
    weight = (codes - np.repeat(zero, group, axis=1)) * np.repeat(scale, group, axis=1)
    scaling = tensors.get(f"{module}.prequant_scaling_factor")
    return weight if scaling is None else weight * scaling.astype(np.float64)


def converted(source: Path, out_dir: Path, tp: int = 1, **options: Any) -> list[dict[str, Any]]:
    out_dir.mkdir()
    convert_checkpoint(
        source,
        out_dir,
        tp=tp,
        pp=1,
        progress=SilentProgress(),
        options=ConvertOptions(**options),
    )
    return [load_file(out_dir / f"rank{rank}.safetensors") for rank in range(tp)]


def expected(linears: dict[str, Linear], target: str, tp: int, rank: int) -> np.ndarray:
    """The part of one rank, cut from whole weights by hand."""
    whole = [linears[f"model.layers.1.{name}"].weight() for name in TARGETS[target]]
    axis = 1 if target in ("attention.dense", "mlp.proj") else 0
    return np.concatenate([np.split(weight, tp, axis)[rank] for weight in whole])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("method", ["awq", "gptq", "gptq_v2"])
def test_exact(tiny_llama: Path, tmp_path: Path, method: str, symmetric: bool, tp: int) -> None:
    linears = write_foreign(tiny_llama, tmp_path / "hf", method=method, symmetric=symmetric)
    ranks = converted(tmp_path / "hf", tmp_path / "out", tp)
    for rank, tensors in enumerate(ranks):
        for target in TARGETS:
            found = dequantize(tensors, f"transformer.layers.1.{target}")
            assert np.array_equal(found, expected(linears, target, tp, rank)), (rank, target)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert quantization["group_size"] == 64
    if symmetric:  # the same layout as ModelOpt's, so TensorRT-LLM reads it as it is
        assert quantization["quant_algo"] == "W4A16_AWQ"
        assert not any("zero_point" in name for name in ranks[0])
        assert (ranks[0]["transformer.layers.0.mlp.fc.prequant_scaling_factor"] == 1).all()
    else:
        assert quantization["quant_algo"] == "W4A16_GPTQ"
        assert quantization["has_zero_point"] is True
        assert quantization["pre_quant_scale"] is False
        zero = ranks[0]["transformer.layers.0.mlp.fc.weights_zero_point"]
        assert zero.dtype == np.int8
        assert zero.shape == (256 // tp, 2)


def test_what_is_not_quantized_passes_through(tiny_llama: Path, tmp_path: Path) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="awq")
    plain = load_file(tiny_llama / "model.safetensors")
    (rank,) = converted(tmp_path / "hf", tmp_path / "out")
    assert np.array_equal(rank["lm_head.weight"], plain["lm_head.weight"])
    norm = "transformer.layers.1.input_layernorm.weight"
    assert np.array_equal(rank[norm], plain["model.layers.1.input_layernorm.weight"])


def test_large_linears_are_repacked_in_parts(tiny_llama: Path, tmp_path: Path) -> None:
    """Any rows give the same bytes as the whole, also across the steps in which words are unpacked."""
    from pipeline.checkpoint.importers import repacked

    write_foreign(tiny_llama, tmp_path / "hf", method="awq")
    reader = open_checkpoint(tmp_path / "hf").reader
    assert isinstance(reader, repacked.RepackedReader)
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = reader.read(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repacked, "_STEP", 16)
        assert np.array_equal(reader.read(name), whole)
        assert np.array_equal(reader.read_rows(name, 3, 41), whole[3:41])
        assert reader.read_rows(name, 5, 5).shape == (0, 128)
    blocks = [rows for _, rows in reader.row_blocks(name, block_bytes=1000)]
    assert np.array_equal(np.concatenate(blocks), whole)
    assert np.array_equal(reader.read_columns(name, 7, 20), whole[:, 7:20].T)


def test_check_reads_headers_only(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.checkpoint.reader import CheckpointReader

    write_foreign(tiny_llama, tmp_path / "hf", method="gptq")
    monkeypatch.setattr(CheckpointReader, "_read", None)
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format) == []


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_requantized_only_when_asked(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    linears = write_foreign(tiny_llama, tmp_path / "hf", method=method)
    (rank,) = converted(tmp_path / "hf", tmp_path / "out", requantize_asymmetric=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W4A16_AWQ"
    for target in TARGETS:
        weight = expected(linears, target, 1, 0)
        found = dequantize(rank, f"transformer.layers.1.{target}")
        largest = np.abs(weight).reshape(len(weight), -1, 64).max(axis=2)
        error = np.abs(found - weight).reshape(len(weight), -1, 64).max(axis=2)
        assert found.any()
        assert (error > 0).any()
        # Half a step of largest / 7; the scale is rounded up to float16, by less than 1/1024.
        assert (error <= largest / 14 * 1.002).all()


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        ("awq", {"bits": 8}, "quantization_config: bits 8; allowed: 4"),
        ("awq", {"version": "gemv"}, "version 'gemv': another order of codes, made for one kernel"),
        ("awq", {"version": "GEMV_FAST"}, "allowed: gemm, exllama"),
        ("awq", {"group_size": -1}, "group_size -1; allowed: 64, 128"),
        ("awq", {"zero_point": "yes"}, "zero_point 'yes'; allowed: true, false"),
        (
            "awq",
            {"modules_to_not_convert": ["mlp.gate"]},
            "modules_to_not_convert leaves layers unquantized: mlp.gate; allowed: lm_head, ",
        ),
        ("gptq", {"desc_act": True}, "desc_act True: input features would be reordered"),
        ("gptq", {"bits": 3}, "bits 3; allowed: 4"),
        ("gptq", {"checkpoint_format": "marlin"}, "codes in the order of one GPU kernel"),
        ("gptq", {"checkpoint_format": "new"}, "checkpoint_format 'new'; allowed: gptq, gptq_v2"),
        ("gptq", {"lm_head": True}, "lm_head True: lm_head stays float16 here; allowed: False"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: layers are quantized differently"),
    ],
)
def test_options_that_are_refused(
    tiny_llama: Path, tmp_path: Path, method: str, fields: dict[str, Any], text: str
) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method=method, **fields)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "hf")
    assert text in str(caught.value)


def test_all_options_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq", bits=8, desc_act=True, group_size=32)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "hf")
    assert len(caught.value.problems) == 3


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("suffix", "value", "text"),
    [
        ("qzeros", None, "qzeros: missing, but the linear has a qweight"),
        ("scales", np.zeros((2, 8), np.float16), "scales: shape [2, 8]; allowed: [2, 256]"),
        ("qzeros", np.zeros((2, 32), np.int64), "qzeros: dtype I64; allowed: I32"),
        ("qweight", np.zeros((16, 4, 4), np.int32), "qweight: shape [16, 4, 4]; allowed: two"),
        ("qweight", np.zeros((12, 256), np.int32), "qweight: 256 x 96 weights, with groups of 64"),
        ("g_idx", np.zeros(3, np.int32), "g_idx: shape [3]; allowed: [128]"),
        ("qweight", np.zeros((16, 64), np.int32), "scales: shape [2, 256]; allowed: [2, 64]"),
    ],
)
def test_tensors_that_do_not_fit(
    tiny_llama: Path, tmp_path: Path, suffix: str, value: Any, text: str
) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq")
    edit(tmp_path / "hf", **{f"{MODULE}.{suffix}": value})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "hf")
    assert text in str(caught.value)
    assert all(problem.where.startswith(MODULE) for problem in caught.value.problems)


def refused(source: Path, out_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        converted(source, out_dir)
    assert not list(out_dir.iterdir())
    return str(caught.value)


def test_a_config_that_lies_about_symmetry(tiny_llama: Path, tmp_path: Path) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq", sym=True)
    text = refused(tmp_path / "hf", tmp_path / "out")
    assert "zeros are not 8, but quantization_config says that the checkpoint is symmetric" in text


def test_a_zero_that_means_different_things_to_different_readers(
    tiny_llama: Path, tmp_path: Path
) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq")
    edit(tmp_path / "hf", **{f"{MODULE}.qzeros": np.full((2, 32), -1, np.int32)})
    text = refused(tmp_path / "hf", tmp_path / "out")
    assert f"{MODULE}.qzeros: 512 zeros are stored as 15, which is 16 to some readers" in text
    assert 'fix: save the checkpoint with checkpoint_format "gptq_v2"' in text


def test_reordered_groups(tiny_llama: Path, tmp_path: Path) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq")
    order = np.arange(128, dtype=np.int32)[::-1] // 64
    edit(tmp_path / "hf", **{f"{MODULE}.g_idx": np.ascontiguousarray(order)})
    text = refused(tmp_path / "hf", tmp_path / "out")
    assert f"{MODULE}.g_idx: input features are not in the order of their groups" in text
    assert "fix: quantize with desc_act: false" in text


def test_sizes_that_contradict_the_config(tiny_llama: Path, tmp_path: Path) -> None:
    write_foreign(tiny_llama, tmp_path / "hf", method="awq")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 512}))
    text = refused(tmp_path / "hf", tmp_path / "out")
    assert f"{MODULE}.weight: shape [128, 128]; allowed: [256, 128], from config.json" in text


def test_the_plan_knows_the_size_of_every_file(tiny_llama: Path, tmp_path: Path) -> None:
    from pipeline.checkpoint import planned_bytes

    write_foreign(tiny_llama, tmp_path / "hf", method="awq")
    converted(tmp_path / "hf", tmp_path / "out", tp=2)
    checkpoint = open_checkpoint(tmp_path / "hf")
    size = planned_bytes(checkpoint.shape, checkpoint.format, Mapping(2, 1, 0))
    assert (tmp_path / "out" / "rank0.safetensors").stat().st_size == size


def test_biases_of_zeros_are_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    """AutoGPTQ gives every linear a bias, whether the model has one or not."""
    write_foreign(tiny_llama, tmp_path / "hf", method="gptq")
    edit(tmp_path / "hf", **{f"{MODULE}.bias": np.zeros(256, np.float16)})
    (rank,) = converted(tmp_path / "hf", tmp_path / "out")
    assert not any(name.endswith("bias") for name in rank)
    edit(tmp_path / "hf", **{f"{MODULE}.bias": np.full(256, 0.5, np.float16)})
    text = refused(tmp_path / "hf", tmp_path / "real")
    assert f"{MODULE}.bias: not used by any rule" in text
