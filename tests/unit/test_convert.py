"""Conversion: values, every kind of bad checkpoint, and what is left behind when it fails."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint import detect_format, open_checkpoint, planned_bytes
from pipeline.checkpoint.cast import Caster
from pipeline.checkpoint.convert import check_checkpoint, convert_checkpoint, rank_path
from pipeline.checkpoint.findings import Findings
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError, ExitCode, PlanError
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from tests.tiny import write_tiny_llama

Tensors = dict[str, np.ndarray]


def convert(source: Path, out_dir: Path, tp: int = 1, pp: int = 1) -> list[Tensors]:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, progress=SilentProgress())
    return [load_file(out_dir / f"rank{rank}.safetensors") for rank in range(tp * pp)]


def edited(source: Path, directory: Path, edit: Callable[[Tensors], Any]) -> Path:
    """A copy of a single-file checkpoint with its tensors changed."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def configured(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))
    return directory


def refused(source: Path, out_dir: Path, tp: int = 1, pp: int = 1) -> str:
    """The text of the CheckpointError; nothing may have been written."""
    out_dir.mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, out_dir, tp=tp, pp=pp, progress=SilentProgress())
    assert caught.value.exit_code is ExitCode.CHECKPOINT
    assert not list(out_dir.iterdir())
    return str(caught.value)


@pytest.fixture(scope="module")
def int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in ModelOpt's unified layout with random codes; one group size covers a row."""
    directory = tmp_path_factory.mktemp("int4") / "model"
    random = np.random.default_rng(0)

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            module = name.removesuffix(".weight")
            tensors[name] = random.integers(0, 256, (rows // 2, columns)).astype(np.uint8)
            scale = random.uniform(0.01, 0.02, (rows, columns // 64))
            tensors[f"{module}.weight_scale"] = scale.astype(np.float32)
            if module.endswith(("o_proj", "down_proj")):
                scale = random.uniform(0.5, 2.0, columns)
                tensors[f"{module}.pre_quant_scale"] = scale.astype(np.float16)

    edited(tiny_llama, directory, quantize)
    write_quant_config(directory)
    return directory


def write_quant_config(directory: Path, **changes: Any) -> None:
    fields = {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
        "exclude_modules": ["lm_head"],
        **changes,
    }
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))


def test_fused_rows_of_one_rank(tiny_llama: Path, tmp_path: Path) -> None:
    """[q heads of the rank; k heads; v heads], by hand for tp 2: 4 heads, 2 KV heads of 32."""
    hf = load_file(tiny_llama / "model.safetensors")
    ranks = convert(tiny_llama, tmp_path / "out", tp=2)
    attention = "model.layers.1.self_attn."
    for rank, tensors in enumerate(ranks):
        expected = np.concatenate(
            [
                hf[f"{attention}q_proj.weight"][64 * rank : 64 * (rank + 1)],
                hf[f"{attention}k_proj.weight"][32 * rank : 32 * (rank + 1)],
                hf[f"{attention}v_proj.weight"][32 * rank : 32 * (rank + 1)],
            ]
        )
        np.testing.assert_array_equal(
            tensors["transformer.layers.1.attention.qkv.weight"], expected
        )
        np.testing.assert_array_equal(
            tensors["transformer.layers.1.attention.dense.weight"],
            hf[f"{attention}o_proj.weight"][:, 64 * rank : 64 * (rank + 1)],
        )


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_plan_knows_the_size_of_every_file(
    int4: Path, tiny_llama: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    for index, source in enumerate((int4, tiny_llama)):
        out_dir = tmp_path / str(index)
        convert(source, out_dir, tp, pp)
        checkpoint = open_checkpoint(source)
        for mapping in mappings(tp, pp):
            size = rank_path(out_dir, mapping.rank).stat().st_size
            assert planned_bytes(checkpoint.shape, checkpoint.format, mapping) == size


def test_stages_with_uneven_layers(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=True)
    hf = load_file(source / "model.safetensors")
    first, last = convert(source, tmp_path / "out", pp=2)
    # stage 0: layers 0, 1 and the embedding; stage 1: layer 2, counted from 0, the norm and the head
    for stage, local, layer in ((first, 0, 0), (first, 1, 1), (last, 0, 2)):
        np.testing.assert_array_equal(
            stage[f"transformer.layers.{local}.mlp.fc.weight"],
            hf[f"model.layers.{layer}.mlp.gate_proj.weight"],
        )
    assert "transformer.layers.1.mlp.fc.weight" not in last
    assert {"transformer.vocab_embedding.weight"} == first.keys() - last.keys() - {
        name for name in first if ".layers.1." in name
    }
    embedding = hf["model.embed_tokens.weight"]
    assert "lm_head.weight" not in hf
    np.testing.assert_array_equal(first["transformer.vocab_embedding.weight"], embedding)
    np.testing.assert_array_equal(last["lm_head.weight"], embedding)
    np.testing.assert_array_equal(last["transformer.ln_f.weight"], hf["model.norm.weight"])


def use_blocks_of(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CheckpointReader.row_blocks
    monkeypatch.setattr(
        CheckpointReader,
        "row_blocks",
        lambda self, name, _=0, within=None: whole(self, name, block_bytes, within),
    )


def test_small_blocks_give_the_same_bytes(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(int4, tmp_path / "whole", tp=2)
    use_blocks_of(700, monkeypatch)
    for a, b in zip(whole, convert(int4, tmp_path / "blocks", tp=2), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables of 24 MB, read in blocks of 1 MB."""
    source = write_tiny_llama(tmp_path / "model", vocab_size=48000, hidden_size=256)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    use_blocks_of(1 << 20, monkeypatch)
    tracemalloc.start()
    try:
        convert_checkpoint(source, out_dir, tp=2, pp=1, progress=SilentProgress())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 << 20  # seen: 3.1 MB


def test_bfloat16_and_float32_become_float16(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    for dtype in ("bfloat16", "float32"):
        source = write_tiny_llama(tmp_path / dtype, dtype=dtype, num_hidden_layers=1)
        (rank,) = convert(source, tmp_path / f"{dtype}-out")
        hf = load_torch(source / "model.safetensors")
        expected = hf["model.layers.0.mlp.down_proj.weight"].to(torch.float16).numpy()
        np.testing.assert_array_equal(rank["transformer.layers.0.mlp.proj.weight"], expected)


def test_every_bfloat16_value_is_cast_as_torch_does() -> None:
    import torch

    bits = np.arange(65536, dtype=np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    fits = np.abs(wide) < 65520  # below: rounds to at most 65504
    values = bits[fits].view(ml_dtypes.bfloat16)
    findings = Findings()
    caster = Caster(findings)
    ours = caster.cast("x", values, "F16")
    theirs = torch.from_numpy(bits[fits].view(np.int16)).view(torch.bfloat16).to(torch.float16)
    np.testing.assert_array_equal(ours.view(np.uint16), theirs.numpy().view(np.uint16))
    assert not findings.losses


def test_values_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "model", dtype="float32", num_hidden_layers=1)

    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = -1e5
        tensors["model.layers.0.mlp.up_proj.weight"][4, 5] = 65520.0  # rounds to infinity
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = np.nan
        tensors["model.norm.weight"][0] = 65519.0  # rounds to 65504: fine

    bad = edited(source, tmp_path / "bad", spoil)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(bad, out_dir, tp=1, pp=1, progress=SilentProgress())
    assert {str(problem) for problem in caught.value.problems} == {
        "model.layers.0.mlp.up_proj.weight: 2 values do not fit float16, the largest is 100000; "
        "allowed: -65504 to 65504",
        "model.layers.0.mlp.down_proj.weight: 1 values are NaN or Inf; fix: repair the weights, or "
        "keep them so with convert.allow_not_finite: true",
    }
    assert not (out_dir / "config.json").exists()


def test_nan_in_a_float16_source(tiny_llama: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.norm.weight"][:2] = [np.nan, -np.inf]

    bad = edited(tiny_llama, tmp_path / "bad", spoil)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 2 values are NaN or Inf"):
        convert_checkpoint(bad, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())


def test_all_problems_of_the_headers_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(128, np.float16)
        tensors["model.norm.weight"] = np.ones(127, np.float16)
        tensors["model.layers.0.input_layernorm.weight"] = np.ones(128, np.int32)

    message = refused(edited(tiny_llama, tmp_path / "bad", spoil), tmp_path / "out")
    assert set(message.splitlines()) == {
        "lm_head.weight: missing; allowed: F16 [512, 128]; "
        "fix: if the model ties its embeddings, set tie_word_embeddings in config.json",
        "model.layers.1.mlp.up_proj.weight: missing; allowed: F16 [256, 128]",
        "model.layers.1.self_attn.q_proj.bias: not used by any rule; "
        "fix: check the architecture, LlamaForCausalLM",
        "model.norm.weight: shape [127]; allowed: [128], from config.json",
        "model.layers.0.input_layernorm.weight: dtype I32; allowed: F16, BF16, F32",
    }


def test_check_reads_headers_only(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For plan: no byte of data is touched."""
    checkpoint = open_checkpoint(tiny_llama)
    monkeypatch.setattr(type(checkpoint.reader), "_read", None)
    assert check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format) == []


def test_buffers_of_old_checkpoints_are_ignored(tiny_llama: Path, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = np.ones(16, np.float32)

    old = edited(tiny_llama, tmp_path / "old", add)
    (a,), (b,) = convert(old, tmp_path / "a"), convert(tiny_llama, tmp_path / "b")
    assert a.keys() == b.keys()


def test_tied_model_with_a_head_of_its_own(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "model", tie_word_embeddings=True)

    def copy(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    convert(edited(source, tmp_path / "copy", copy), tmp_path / "out")

    def differ(tensors: Tensors) -> None:
        copy(tensors)
        tensors["lm_head.weight"][0, 0] += 1

    message = refused(edited(source, tmp_path / "differ", differ), tmp_path / "refused")
    assert message == (
        "lm_head.weight: differs from model.embed_tokens.weight, but config.json ties the "
        "embeddings; fix: set tie_word_embeddings to false, or remove the tensor"
    )


def test_int4_tensors(int4: Path, tmp_path: Path) -> None:
    hf = load_file(int4 / "model.safetensors")
    ranks = convert(int4, tmp_path / "out", tp=2)
    for rank, tensors in enumerate(ranks):
        proj = {
            suffix: tensors[f"transformer.layers.0.mlp.proj.{suffix}"]
            for suffix in ("weight", "weights_scaling_factor", "prequant_scaling_factor")
        }
        down = "model.layers.0.mlp.down_proj"
        columns = slice(128 * rank, 128 * (rank + 1))
        assert proj["weight"].dtype == np.int8
        np.testing.assert_array_equal(
            proj["weight"].view(np.uint8), hf[f"{down}.weight"][:, columns]
        )
        groups = slice(2 * rank, 2 * (rank + 1))
        np.testing.assert_array_equal(
            proj["weights_scaling_factor"], hf[f"{down}.weight_scale"][:, groups]
        )
        np.testing.assert_array_equal(
            proj["prequant_scaling_factor"], hf[f"{down}.pre_quant_scale"][columns]
        )
        folded = tensors["transformer.layers.0.attention.qkv.prequant_scaling_factor"]
        assert folded.dtype == np.float16
        np.testing.assert_array_equal(folded, np.ones(128))


def test_algorithms_without_scales_get_ones(int4: Path, tmp_path: Path) -> None:
    """Round-to-nearest and GPTQ are stored the same way, but have no pre-quant scale anywhere."""

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("pre_quant_scale")]:
            del tensors[name]

    (rank,) = convert(edited(int4, tmp_path / "rtn", drop), tmp_path / "out")
    np.testing.assert_array_equal(
        rank["transformer.layers.1.mlp.proj.prequant_scaling_factor"], np.ones(256)
    )


def test_one_lost_scale_is_not_filled_in(int4: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.pre_quant_scale"
    bad = edited(int4, tmp_path / "bad", lambda tensors: tensors.pop(name))
    assert refused(bad, tmp_path / "out") == (
        f"{name}: missing, but its siblings have one; allowed: F16 [256]"
    )


def explicit(tensors: Tensors, **linears: float) -> None:
    for layer in range(2):
        for linear, value in linears.items():
            name = f"model.layers.{layer}.self_attn.{linear}.pre_quant_scale"
            tensors[name] = np.full(128, value, np.float16)


def test_explicit_scale_of_fused_linears(int4: Path, tmp_path: Path) -> None:
    source = edited(
        int4, tmp_path / "same", lambda t: explicit(t, q_proj=0.5, k_proj=0.5, v_proj=0.5)
    )
    (rank,) = convert(source, tmp_path / "out")
    scale = rank["transformer.layers.0.attention.qkv.prequant_scaling_factor"]
    np.testing.assert_array_equal(scale, np.full(128, 0.5))


def test_explicit_scales_that_differ_or_are_incomplete(int4: Path, tmp_path: Path) -> None:
    differ = edited(
        int4, tmp_path / "differ", lambda t: explicit(t, q_proj=0.5, k_proj=0.5, v_proj=0.25)
    )
    attention = "model.layers.0.self_attn"
    assert refused(differ, tmp_path / "a") == (
        f"{attention}.v_proj.pre_quant_scale: differs from {attention}.q_proj.pre_quant_scale, "
        "but both become the one scale of a fused linear "
        "(transformer.layers.0.attention.qkv.prequant_scaling_factor)"
    )
    lost = edited(int4, tmp_path / "lost", lambda t: explicit(t, q_proj=0.5, k_proj=0.5))
    assert "layers.1.self_attn.v_proj.pre_quant_scale: missing, but" in refused(
        lost, tmp_path / "b"
    )


def test_config_contradicts_the_tensors(tiny_llama: Path, int4: Path, tmp_path: Path) -> None:
    wrong = configured(shutil.copytree(tiny_llama, tmp_path / "wrong"), vocab_size=576)
    assert "lm_head.weight: shape [512, 128]; allowed: [576, 128], from config.json" in refused(
        wrong, tmp_path / "a"
    )
    group = shutil.copytree(int4, tmp_path / "group")
    write_quant_config(group, group_size=128)
    assert "q_proj.weight_scale: shape [128, 2]; allowed: [128, 1]" in refused(
        group, tmp_path / "b"
    )


def test_illegal_mapping(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        convert_checkpoint(int4, tmp_path, tp=4, pp=3, progress=SilentProgress())
    assert [str(problem) for problem in caught.value.problems] == [
        "tp=4: num_attention_heads: 32 elements on each of tp=4 ranks are not a multiple of 64; "
        "allowed: tp 1, 2",
        "pp=3: the model has only 2 layers; allowed: pp 1 to 2",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            "quant_algo 'FP8_PER_CHANNEL_PER_TOKEN': one scale per token, which no table describes; "
            "allowed: plain float16/bfloat16/float32 weights",
        ),
        ({"quant_algo": None}, "quant_algo None; allowed: plain"),
        ({"quant_algo": "NVFP4"}, "quant_algo 'NVFP4': 4-bit floats; no engine here has kernels"),
        ({"quant_algo": "W4A16_GPTQ"}, "has_zero_point is not set; allowed: true with W4A16_GPTQ"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'; allowed: null, FP8, INT8"),
        ({"has_zero_point": True}, "has_zero_point is set; allowed: false"),
        ({"group_size": 32}, "group_size 32; allowed: 64, 128"),
        ({"group_size": None}, "group_size None; allowed: 64, 128"),
        (
            {"exclude_modules": ["lm_head", "model.layers.7.mlp*"]},
            "exclude_modules: 'model.layers.7.mlp*' names no module of LlamaForCausalLM",
        ),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers is missing or empty"),
    ],
)
def test_quantization_that_is_not_supported(
    int4: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    directory = shutil.copytree(int4, tmp_path / "model")
    write_quant_config(directory, **changes)
    with pytest.raises(CheckpointError) as caught:
        detect_format(directory)
    assert text in str(caught.value)
    assert "hf_quant_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        (
            {"quant_method": "bitsandbytes", "bits": 4},
            "config.json: quantization_config: quant_method 'bitsandbytes' is not supported; "
            "allowed: plain float16/bfloat16/float32 weights, ModelOpt unified int4_awq",
        ),
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported"),
        ({}, "quant_method None is not supported"),
        ("int4", "config.json: quantization_config: 'int4'; allowed: null, a mapping"),
        (
            {"quant_method": "modelopt"},
            "hf_quant_config.json: missing, but config.json says that ModelOpt quantized",
        ),
    ],
)
def test_other_quantizers(tiny_llama: Path, tmp_path: Path, declared: Any, text: str) -> None:
    source = shutil.copytree(tiny_llama, tmp_path / "model")
    configured(source, quantization_config=declared)
    with pytest.raises(CheckpointError) as caught:
        detect_format(source)
    assert text in str(caught.value)


def test_formats_that_are_found(int4: Path, tiny_llama: Path) -> None:
    assert detect_format(int4) == "int4_awq"
    assert open_checkpoint(int4).format.group_size == 64
    assert detect_format(tiny_llama) == "fp16"


def test_bad_config_files(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        detect_format(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: Expecting"):
        detect_format(tmp_path)
    shutil.copy(tiny_llama / "config.json", tmp_path / "config.json")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": 4}')
    with pytest.raises(CheckpointError, match="no mapping called quantization"):
        detect_format(tmp_path)


def test_an_existing_file_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rank0.safetensors").write_text("precious")
    with pytest.raises(FileExistsError):
        convert_checkpoint(tiny_llama, tmp_path, tp=1, pp=1, progress=SilentProgress())
    assert (tmp_path / "rank0.safetensors").read_text() == "precious"
