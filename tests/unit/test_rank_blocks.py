"""Ranks converted in any blocks: the same bytes, and the same counts of lost values, as all at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_ranks, open_source
from pipeline.checkpoint.convert_processes import blocks_of_ranks
from pipeline.checkpoint.findings import Findings, merged
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama
from tests.tiny_models import TINY, write_tiny

# For tp 8 with two KV heads (four ranks hold the same), and 337 tokens in 8 parts (the last is short).
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "vocab_size": 337,
}


def blocked(
    source: Path, out_dir: Path, *, tp: int, pp: int, moe_ep: int = 1, processes: int
) -> tuple[dict[str, str], Findings]:
    """Digest of every rank file, and what was found in all blocks together."""
    out_dir.mkdir()
    ranks = mappings(tp, pp, moe_ep)
    found = []
    for block in blocks_of_ranks(tp, pp, processes):
        checkpoint = open_source(source, tp=tp, options=ConvertOptions(pad_ffn=True))
        own = [ranks[rank] for rank in block]
        found.append(convert_ranks(checkpoint, out_dir, own, progress=SilentProgress()))
    files = sorted(out_dir.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, merged(
        found
    )


def spoil(source: Path) -> dict[str, int]:
    """Every second of a tensor's diagonal becomes NaN; returns how many, by name."""
    path = source / "model.safetensors"
    tensors = load_file(path)
    spoilt = {}
    for name, values in tensors.items():
        last = values.reshape(len(values), -1)
        columns = np.arange(len(values)) % last.shape[1]
        last[np.arange(len(values)), columns] = np.nan
        spoilt[name] = int(np.isnan(values).sum())
    save_file(tensors, path, {"format": "pt"})
    return spoilt


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(tmp_path: Path, architecture: str) -> None:
    plain = {"rope_scaling": None} if architecture.startswith("Phi3") else {}
    source = write_tiny(architecture, tmp_path / "hf", **SIZES, **plain)
    spoilt = spoil(source)
    for tp, pp, moe_ep in ((8, 1, 1), (4, 2, 4 if architecture.startswith("Mixtral") else 1)):
        whole, losses = blocked(
            source, tmp_path / f"whole{tp}", tp=tp, pp=pp, moe_ep=moe_ep, processes=1
        )
        assert {name: lost.not_finite for name, lost in losses.by_source().items()} == spoilt
        for processes in (3, tp * pp):
            out_dir = tmp_path / f"{tp}-{processes}"
            parts, found = blocked(
                source, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, processes=processes
            )
            assert parts == whole
            assert found.by_source() == losses.by_source()


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_linears_with_zero_points_and_padding(tmp_path: Path, method: str) -> None:
    plain = write_tiny_llama(
        tmp_path / "plain", hidden_size=256, intermediate_size=320, num_key_value_heads=4
    )
    write_foreign(plain, tmp_path / "hf", method=method)
    whole, _ = blocked(tmp_path / "hf", tmp_path / "whole", tp=4, pp=1, processes=1)
    parts, _ = blocked(tmp_path / "hf", tmp_path / "parts", tp=4, pp=1, processes=4)
    assert parts == whole


def test_a_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "hf", tie_word_embeddings=True)
    spoilt = spoil(source)
    _, losses = blocked(source, tmp_path / "out", tp=2, pp=2, processes=4)
    assert {name: lost.not_finite for name, lost in losses.by_source().items()} == spoilt


def test_a_block_reads_the_rows_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks together read column-parallel weights once, and only row-parallel ones each."""
    source = write_tiny_llama(tmp_path / "hf", num_key_value_heads=4)
    read: dict[str, int] = {}
    blocks = CheckpointReader.row_blocks

    def counting(self: CheckpointReader, name: str, *rest: object, **more: object) -> object:
        for start, rows in blocks(self, name, *rest, **more):
            read[name] = read.get(name, 0) + rows.size
            yield start, rows

    monkeypatch.setattr(CheckpointReader, "row_blocks", counting)
    blocked(source, tmp_path / "out", tp=4, pp=1, processes=2)
    sizes = {name: values.size for name, values in load_file(source / "model.safetensors").items()}
    twice = {name for name, count in read.items() if count == 2 * sizes[name]}
    assert {name for name in read if read[name] == sizes[name]} == read.keys() - twice
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in twice} == {
        "down_proj",
        "input_layernorm",
        "norm",
        "o_proj",
        "post_attention_layernorm",
    }
