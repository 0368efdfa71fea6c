"""Our rank files against ModelOpt's own TensorRT-LLM exporter, tensor for tensor and bit for bit.

Deliberate differences are in `CONFIG_DIFFERENCES`, `ONLY_MODELOPT`, `ONLY_OURS` and in the tests named
`test_deliberate_*`; nothing else may differ.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress
from tests.tiny import write_tiny_llama

AWQ_MAPPINGS = [(1, 1), (2, 1), (1, 2), (2, 2)]

# Both write the key, with different values: (ModelOpt's, ours), and why.
CONFIG_DIFFERENCES = {
    # TensorRT-LLM's own default; a float32 cast of the logits costs nothing and sampling wants it.
    "logits_dtype": ("float16", "float32"),
}
# Keys that only ModelOpt writes: none is read by TensorRT-LLM 1.2.1's LLaMAConfig.
ONLY_MODELOPT = {
    "producer",  # who wrote it; our manifest says that
    "rank",  # of the rank that happened to be exported last
    "decoder",
    "rmsnorm",
    "bias",
    "lm_head_bias",
    "rotary_pct",  # 1.0 is what TensorRT-LLM assumes
    "share_embedding_table",  # false, and both tables are written, by both
    "residual_mlp",  # false, the default
}
# Keys that only we write, all read by TensorRT-LLM, so that nothing hangs on its defaults.
ONLY_OURS = {"rotary_scaling", "qk_layernorm", "attn_bias", "mlp_bias"}


@dataclass
class Exports:
    """What ModelOpt made of one model."""

    plain: Path
    unified: Path
    trtllm: dict[tuple[int, int], Path]


def _export_trtllm(model: Any, directory: Path, tp: int, pp: int) -> Path:
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model,
            "llama",
            torch.float16,
            directory,
            inference_tensor_parallel=tp,
            inference_pipeline_parallel=pp,
        )
    return directory


def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16).eval()


def _quantize(model: Any, group_size: int) -> Any:
    import modelopt.torch.quantization as mtq
    import torch

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        block_sizes = (entry.get("cfg") or {}).get("block_sizes") or {}
        if -1 in block_sizes:
            block_sizes[-1] = group_size
    torch.manual_seed(0)
    batches = [torch.randint(0, 512, (4, 32)) for _ in range(2)]
    return mtq.quantize(model, config, lambda m: [m(batch) for batch in batches])


def _export_awq(directory: Path, *, group_size: int, mappings: Any, **overrides: Any) -> Exports:
    from modelopt.torch.export import export_hf_checkpoint

    plain = write_tiny_llama(directory / "plain", **overrides)
    model = _quantize(_load(plain), group_size)
    vocab_size = model.config.vocab_size
    trtllm = {}
    for tp, pp in mappings:
        trtllm[tp, pp] = _export_trtllm(model, directory / f"trtllm-{tp}-{pp}", tp, pp)
        model.config.vocab_size = vocab_size  # the exporter leaves the padded size behind
    unified = directory / "unified"
    export_hf_checkpoint(model, export_dir=unified)
    return Exports(plain, unified, trtllm)


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return _export_awq(
        tmp_path_factory.mktemp("awq"),
        group_size=128,
        mappings=AWQ_MAPPINGS,
        hidden_size=256,
        intermediate_size=512,
    )


@pytest.fixture(scope="module")
def awq_odd_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return _export_awq(
        tmp_path_factory.mktemp("awq-odd"),
        group_size=64,
        mappings=[(2, 1)],
        vocab_size=515,
        tie_word_embeddings=True,
        num_hidden_layers=1,
    )


def _convert(source: Path, out_dir: Path, tp: int, pp: int) -> Path:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, progress=SilentProgress())
    return out_dir


def _ranks(directory: Path, world_size: int) -> list[dict[str, np.ndarray]]:
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    assert names == sorted(f"rank{rank}.safetensors" for rank in range(world_size))
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(world_size)]


def _assert_same(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.dtype == theirs.dtype, name
    assert ours.shape == theirs.shape, name
    assert ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize(
    ("overrides", "mappings"),
    [
        ({}, [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]),  # tp 4 repeats the two KV heads
        ({"vocab_size": 515, "tie_word_embeddings": True}, [(2, 2), (4, 1)]),  # padded vocabulary
        ({"head_dim": 48, "num_key_value_heads": 1, "dtype": "bfloat16"}, [(1, 1), (2, 1)]),
        ({"num_key_value_heads": 4, "dtype": "float32", "max_shard_size": "200KB"}, [(2, 2)]),
    ],
    ids=["gqa", "tied-odd-vocabulary", "mqa-head-dim-bf16", "mha-fp32-sharded"],
)
def test_plain_is_bit_identical(
    tmp_path: Path, overrides: dict[str, Any], mappings: list[tuple[int, int]]
) -> None:
    source = write_tiny_llama(tmp_path / "plain", **overrides)
    model = _load(source)
    for tp, pp in mappings:
        theirs = _export_trtllm(model, tmp_path / f"theirs-{tp}-{pp}", tp, pp)
        ours = _convert(source, tmp_path / f"ours-{tp}-{pp}", tp, pp)
        for rank, (a, b) in enumerate(
            zip(_ranks(ours, tp * pp), _ranks(theirs, tp * pp), strict=True)
        ):
            assert a.keys() == b.keys()
            for name in a:
                _assert_same(a[name], b[name], f"rank {rank} {name}")
        _compare_configs(ours, theirs)


def _compare_configs(ours_dir: Path, theirs_dir: Path) -> None:
    ours = json.loads((ours_dir / "config.json").read_text())
    theirs = json.loads((theirs_dir / "config.json").read_text())
    assert theirs.keys() - ours.keys() == ONLY_MODELOPT
    assert ours.keys() - theirs.keys() == ONLY_OURS
    for key in ours.keys() & theirs.keys() - {"rotary_scaling"}:
        expected = CONFIG_DIFFERENCES.get(key, (theirs[key], theirs[key]))
        assert (theirs[key], ours[key]) == expected, key


@pytest.mark.parametrize(("tp", "pp"), AWQ_MAPPINGS)
def test_int4_linears_are_bit_identical(awq: Exports, tmp_path: Path, tp: int, pp: int) -> None:
    """dense, proj: all three tensors. qkv: codes and scales (both forms average q, k and v)."""
    ours = _ranks(_convert(awq.unified, tmp_path / "ours", tp, pp), tp * pp)
    theirs = _ranks(awq.trtllm[tp, pp], tp * pp)
    different = ("attention.qkv.prequant", "_layernorm.", "mlp.fc.", "mlp.gate.")
    compared = 0
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert a[name].shape == b[name].shape, name
            if not any(part in name for part in different):
                _assert_same(a[name], b[name], f"rank {rank} {name}")
                compared += 1
    # 8 of each layer (2 layers); embedding on the first stage; ln_f and lm_head on the last
    assert compared == tp * (2 * 8 + 3)
    _compare_configs(tmp_path / "ours", awq.trtllm[tp, pp])


@pytest.mark.parametrize(("tp", "pp"), AWQ_MAPPINGS)
def test_deliberate_folded_scales(awq: Exports, tmp_path: Path, tp: int, pp: int) -> None:
    """ModelOpt's unified layout folds the scale of q, k, v into the norm: ours are ones.

    norm (ours) == norm * scale (theirs) in float16, bit for bit: the same factor, applied once.
    """
    ours = _ranks(_convert(awq.unified, tmp_path / "ours", tp, pp), tp * pp)
    theirs = _ranks(awq.trtllm[tp, pp], tp * pp)
    for a, b in zip(ours, theirs, strict=True):
        for layer in range(2 // pp):
            prefix = f"transformer.layers.{layer}."
            qkv = f"{prefix}attention.qkv.prequant_scaling_factor"
            norm = f"{prefix}input_layernorm.weight"
            assert not np.array_equal(b[qkv], np.ones_like(b[qkv])), "nothing was folded"
            _assert_same(a[norm], b[norm] * b[qkv], norm)
            for linear in ("attention.qkv", "mlp.fc", "mlp.gate"):
                scale = a[f"{prefix}{linear}.prequant_scaling_factor"]
                _assert_same(scale, np.ones_like(scale), linear)


def _dequantize(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[out/2, in] bytes and [out, in/g] scales -> float32 [out, in]; written for this test alone."""
    codes = packed.view(np.uint8)
    rows = np.stack([codes & 15, codes >> 4], axis=1).astype(np.int32)
    rows = np.where(rows > 7, rows - 16, rows).reshape(-1, packed.shape[1])
    return rows * np.repeat(scale, packed.shape[1] // scale.shape[1], axis=1)


@pytest.mark.parametrize(("tp", "pp"), AWQ_MAPPINGS)
@pytest.mark.parametrize(("target", "source"), [("fc", "gate_proj"), ("gate", "up_proj")])
def test_deliberate_averaged_mlp(
    awq: Exports, tmp_path: Path, tp: int, pp: int, target: str, source: str
) -> None:
    """gate and up share one scale in the unified layout, each has its own in ModelOpt's TRT export.

    What the linear computes, norm included, equals the unified checkpoint's exactly; and it is as close
    to the weights before quantization as ModelOpt's TRT export is.
    """
    ours = _ranks(_convert(awq.unified, tmp_path / "ours", tp, pp), tp * pp)
    theirs = _ranks(awq.trtllm[tp, pp], tp * pp)
    unified = load_file(awq.unified / "model.safetensors")
    plain = load_file(awq.plain / "model.safetensors")
    for layer in range(2):
        hf = f"model.layers.{layer}."
        norm = f"{hf}post_attention_layernorm.weight"
        wanted = plain[norm].astype(np.float32) * plain[f"{hf}mlp.{source}.weight"]
        exact = unified[norm].astype(np.float32) * _dequantize(
            unified[f"{hf}mlp.{source}.weight"], unified[f"{hf}mlp.{source}.weight_scale"]
        )
        stage, local = divmod(layer, 2 // pp)
        ranks = range(stage * tp, (stage + 1) * tp)
        mine = np.concatenate([_effective(ours[rank], local, target) for rank in ranks])
        modelopts = np.concatenate([_effective(theirs[rank], local, target) for rank in ranks])
        np.testing.assert_array_equal(mine, exact)
        error, modelopts_error = (
            np.linalg.norm(got - wanted) / np.linalg.norm(wanted) for got in (mine, modelopts)
        )
        assert error == pytest.approx(modelopts_error, rel=0.02)  # seen: 0.1 to 0.4 %


def _effective(rank: dict[str, np.ndarray], layer: int, target: str) -> np.ndarray:
    """norm x pre-quant scale x weight of one MLP linear, float32 [out, in]."""
    prefix = f"transformer.layers.{layer}."
    linear = f"{prefix}mlp.{target}."
    scale = rank[f"{prefix}post_layernorm.weight"].astype(np.float32)
    scale = scale * rank[f"{linear}prequant_scaling_factor"]
    return scale * _dequantize(rank[f"{linear}weight"], rank[f"{linear}weights_scaling_factor"])


def test_deliberate_vocabulary_is_not_padded_to_64(
    awq_odd_vocabulary: Exports, tmp_path: Path
) -> None:
    """ModelOpt pads embedding and lm_head to a multiple of 64 although neither is quantized, and calls
    that the vocabulary, so a padding row (logit 0) can be sampled. We pad to a multiple of tp only and
    keep vocab_size, which TensorRT-LLM expects of its own converter."""
    ours_dir = _convert(awq_odd_vocabulary.unified, tmp_path / "ours", 2, 1)
    ours = _ranks(ours_dir, 2)
    theirs = _ranks(awq_odd_vocabulary.trtllm[2, 1], 2)
    plain = load_file(awq_odd_vocabulary.plain / "model.safetensors")["model.embed_tokens.weight"]
    for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
        whole = np.concatenate([rank[name] for rank in ours])
        padded = np.concatenate([rank[name] for rank in theirs])
        assert (whole.shape[0], padded.shape[0]) == (516, 576)
        _assert_same(whole, padded[:516], name)
        _assert_same(whole[:515], plain, name)
        assert not whole[515:].any()
    configs = [
        json.loads((directory / "config.json").read_text())["vocab_size"]
        for directory in (ours_dir, awq_odd_vocabulary.trtllm[2, 1])
    ]
    assert configs == [515, 576]


def test_group_size_64(awq_odd_vocabulary: Exports, tmp_path: Path) -> None:
    ours_dir = _convert(awq_odd_vocabulary.unified, tmp_path / "ours", 2, 1)
    ours, theirs = _ranks(ours_dir, 2), _ranks(awq_odd_vocabulary.trtllm[2, 1], 2)
    for a, b in zip(ours, theirs, strict=True):
        for linear in ("attention.dense", "mlp.proj"):
            for tensor in ("weight", "weights_scaling_factor", "prequant_scaling_factor"):
                name = f"transformer.layers.0.{linear}.{tensor}"
                _assert_same(a[name], b[name], name)
    config = json.loads((ours_dir / "config.json").read_text())
    assert config["quantization"]["group_size"] == 64


def test_rotary_fields_match_modelopt(tmp_path: Path) -> None:
    """With transformers 4.57 the exporter keeps base and scaling; values must be the same."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = write_tiny_llama(
        tmp_path / "plain", rope_theta=500000.0, rope_scaling=scaling, num_hidden_layers=1
    )
    theirs_dir = _export_trtllm(_load(source), tmp_path / "theirs", 1, 1)
    ours_dir = _convert(source, tmp_path / "ours", 1, 1)
    ours = json.loads((ours_dir / "config.json").read_text())
    theirs = json.loads((theirs_dir / "config.json").read_text())
    assert ours["rotary_base"] == theirs["rotary_base"] == 500000.0
    for key, value in theirs["rotary_scaling"].items():
        assert ours["rotary_scaling"][key] == value, key
    assert ours["rotary_scaling"] == {**scaling, "type": "llama3"}
