"""Seeded random checkpoints: reproducible, loadable by transformers, independent of how they are cut."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint import open_checkpoint
from pipeline.checkpoint.convert import check_checkpoint, convert_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.synthetic import write_synthetic
from pipeline.errors import CheckpointError
from pipeline.progress import SilentProgress

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 301,
}


def write(directory: Path, seed: int = 0, **options: Any) -> Path:
    directory.mkdir()
    config = {**CONFIG, **options.pop("config", {})}
    write_synthetic(config, directory, seed=seed, progress=SilentProgress(), **options)
    return directory


def digests(directory: Path) -> dict[str, str]:
    reader = CheckpointReader(directory)
    return {
        name: hashlib.sha256(reader.read(name).tobytes()).hexdigest() for name in reader.tensors
    }


def test_the_seed_decides_every_tensor(tmp_path: Path) -> None:
    first, again, other = (
        digests(write(tmp_path / str(index), seed)) for index, seed in enumerate((7, 7, 8))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == len(first), "two tensors are the same"


def test_files_and_order_do_not_matter(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    many = write(tmp_path / "many", max_shard_bytes=60_000)
    shards = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert digests(one) == digests(many)
    # A tensor's bytes do not depend on the rest of the model either.
    deeper = digests(write(tmp_path / "deeper", config={"num_hidden_layers": 3}))
    assert {name: deeper[name] for name in digests(one)} == digests(one)
    for path in many.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(x.nbytes for x in tensors.values()) <= 60_000 or len(tensors) == 1
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for path in many.glob("*.safetensors") for x in load_file(path).values()
    )


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(write(tmp_path / "whole"))
    monkeypatch.setattr("pipeline.checkpoint.synthetic.BLOCK_BYTES", 60)
    assert digests(write(tmp_path / "blocks")) == whole


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True, "head_dim": 20}])
def test_transformers_loads_it(tmp_path: Path, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = write(tmp_path / "model", config=config)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.float16  # config.json says what the files hold
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.float().std() > 0.01


def test_values_are_normal(tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path / "model") / "model.safetensors")
    # 96 x 301 = 28896 values: the standard error of the mean is 0.00012, of the deviation 0.4 %
    table = tensors["model.embed_tokens.weight"].astype(np.float64)
    assert abs(table.mean()) < 0.0005
    assert table.std() == pytest.approx(0.02, rel=0.02)
    assert (np.abs(table) > 0.04).mean() == pytest.approx(0.0455, abs=0.005)  # two sigma
    assert len(np.unique(table)) > 5000
    norms = np.concatenate([x for name, x in tensors.items() if "norm" in name]).astype(np.float64)
    assert norms.mean() == pytest.approx(1.0, abs=0.02)
    assert norms.std() == pytest.approx(0.1, rel=0.15)


def test_same_bytes_on_every_machine(tmp_path: Path) -> None:
    """Frozen: a change of these bytes changes what a rehearsed build is keyed by."""
    found = digests(write(tmp_path / "model", seed=0))
    assert found["model.norm.weight"][:16] == "74ee2e158ceddd0e"
    assert found["model.layers.1.mlp.up_proj.weight"][:16] == "ba76ef35b97ccd88"


def test_it_is_a_checkpoint_that_converts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "model"))
    assert check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format) == []
    (tmp_path / "out").mkdir()
    convert_checkpoint(tmp_path / "model", tmp_path / "out", tp=2, pp=2, progress=SilentProgress())
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_bad_config_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size: 0; allowed: an integer from 1"):
        write(tmp_path / "model", config={"vocab_size": 0})
    assert not list((tmp_path / "model").iterdir())


def test_memory_does_not_grow_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding of 19 MB in blocks of 1 MB."""
    monkeypatch.setattr("pipeline.checkpoint.synthetic.BLOCK_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        write(tmp_path / "model", config={"vocab_size": 100_000})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20  # seen: 3.4 MB
