"""Padding of the feed-forward network: exact, neutral, recorded, and only when asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint import planned_bytes
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.padding import padded_shape
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import PlanError
from pipeline.network import BuildLimits, export_network
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama

PADDED = ConvertOptions(pad_ffn=True)
FFN, PADDED_FFN, TP = 320, 512, 4  # 5 groups of 64; tp 4 needs a multiple of 4 * 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads fill whole groups on four ranks; the FFN does not."""
    return write_tiny_llama(
        tmp_path_factory.mktemp("plain") / "hf",
        hidden_size=256,
        intermediate_size=FFN,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


def convert(source: Path, out_dir: Path, tp: int, options: ConvertOptions) -> None:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=1, progress=SilentProgress(), options=options)


@pytest.mark.parametrize("method", ["plain", "awq", "gptq"])
def test_each_rank_has_its_part_then_zeros(source: Path, tmp_path: Path, method: str) -> None:
    directory = source
    if method != "plain":
        directory = tmp_path / "hf"
        write_foreign(source, directory, method=method, symmetric=method == "gptq")
        with pytest.raises(PlanError, match=r"80 elements on each of tp=4 .*fix: mapping\.pad_ffn"):
            convert(directory, tmp_path / "refused", TP, ConvertOptions())
    convert(directory, tmp_path / "whole", 1, ConvertOptions())
    convert(directory, tmp_path / "cut", TP, PADDED)
    whole = load_file(tmp_path / "whole" / "rank0.safetensors")
    ranks = [load_file(tmp_path / "cut" / f"rank{rank}.safetensors") for rank in range(TP)]
    padded = method != "plain"  # float16 is cut at single rows: 320 / 4 is whole
    for module, axis in (("fc", 0), ("gate", 0), ("proj", 1)):
        for name in [name for name in whole if f"layers.1.mlp.{module}." in name]:
            cut = axis if whole[name].ndim == 2 else None
            if whole[name].ndim == 1 and module == "proj":
                cut = 0  # the pre-quant scale follows the inputs
            if cut is None:
                assert all(np.array_equal(rank[name], whole[name]) for rank in ranks)
                continue
            joined = np.concatenate([rank[name] for rank in ranks], cut)
            size = whole[name].shape[cut]
            real, zeros = np.split(joined, [size], cut)
            assert np.array_equal(real, whole[name]), name
            assert (zeros == (1 if "prequant" in name else 0)).all(), name
            assert joined.shape[cut] == size * (PADDED_FFN if padded else FFN) // FFN, name
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["intermediate_size"] == (PADDED_FFN if padded else FFN)
    assert config.get("unpadded_intermediate_size") == (FFN if padded else None)
    checkpoint = open_checkpoint(directory)
    shape = padded_shape(checkpoint.shape, checkpoint.format, TP)
    for mapping in mappings(TP, 1):
        size = (tmp_path / "cut" / f"rank{mapping.rank}.safetensors").stat().st_size
        assert size == planned_bytes(shape, checkpoint.format, mapping)


def test_odd_float16_sizes_are_padded_to_whole_rows(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "hf", intermediate_size=37)
    convert(source, tmp_path / "out", 2, PADDED)
    ranks = [load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(2)]
    name = "transformer.layers.0.mlp.proj.weight"
    assert [rank[name].shape for rank in ranks] == [(128, 19), (128, 19)]
    assert not ranks[1][name][:, 18].any()
    assert ranks[1][name][:, 17].any()


@pytest.mark.parametrize("method", ["plain", "awq"])
def test_the_model_computes_the_same(source: Path, tmp_path: Path, method: str) -> None:
    """Logits of the padded network equal those of the model's own size."""
    from pipeline.engine.onnxruntime import OnnxNetwork

    directory = tmp_path / "hf"
    if method == "awq":
        write_foreign(source, directory, method="awq", symmetric=True)
    else:
        write_tiny_llama(directory, hidden_size=256, intermediate_size=322, num_key_value_heads=4)
    logits = []
    for name, tp in (("own", 1), ("padded", TP)):
        convert(directory, tmp_path / name, tp, PADDED if tp > 1 else ConvertOptions())
        engine_dir = tmp_path / f"{name}-engine"
        engine_dir.mkdir()
        if tp > 1:
            join_ranks(tmp_path / name, tp)
        export_network(tmp_path / name, 0, engine_dir, BuildLimits(1, 32, 16), SilentProgress())
        network = OnnxNetwork(engine_dir, num_threads=1)
        ids = np.random.default_rng(0).integers(0, 512, (1, 12))
        logits.append(
            network.run(
                input_ids=ids,
                position_ids=np.arange(12)[None],
                write_indices=np.zeros(1, np.int64),
                kv_lengths=np.full(1, 12),
                logit_positions=np.arange(12)[None],
                cache=network.new_cache(1),
            )
        )
    assert np.abs(logits[0]).max() > 1
    # observed 0.0 for both: zeros change no sum. Another machine may add in another order.
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-6)


def join_ranks(directory: Path, tp: int) -> None:
    """Ranks of the padded checkpoint as one rank of the padded size, joined by hand."""
    ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(tp)]
    joined = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if ".qkv." in name and "prequant" not in name:
            pieces = [np.split(part, 3) for part in parts]
            joined[name] = np.concatenate([piece[i] for i in range(3) for piece in pieces])
        elif first.ndim == 1 and not any(f"{m}.prequant" in name for m in ("dense", "proj")):
            joined[name] = first
        else:
            row_parallel = any(f".{module}." in name for module in ("dense", "proj"))
            joined[name] = np.concatenate(parts, 1 if row_parallel and first.ndim == 2 else 0)
    save_file(joined, directory / "rank0.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["mapping"] = {"world_size": 1, "tp_size": 1, "pp_size": 1}
    path.write_text(json.dumps(config))


def test_nothing_to_pad(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    assert padded_shape(checkpoint.shape, checkpoint.format, 4) is checkpoint.shape
    shape = replace(checkpoint.shape, intermediate_size=321)
    assert padded_shape(shape, checkpoint.format, 4).padded_intermediate_size == 324
