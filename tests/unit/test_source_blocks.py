"""Weights read in blocks, however they are stored: any block size gives the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.layout import SourceTensor, stage_targets
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source_blocks import source_blocks
from pipeline.models import shape_from_hf
from pipeline.quant.formats import FORMATS
from tests.tiny_models import write_tiny

# One architecture for each way of storing: transposed and fused, fused blocks, interleaved, with offset.
STORED = ["GPT2LMHeadModel", "Phi3ForCausalLM", "GPTNeoXForCausalLM", "GemmaForCausalLM"]


def _sources(directory: Path) -> list[SourceTensor]:
    shape = shape_from_hf(json.loads((directory / "config.json").read_text()))
    return [
        source
        for target in stage_targets(shape, FORMATS["fp16"], 1, 0)
        for source in target.sources
    ]


def _whole(reader: CheckpointReader, source: SourceTensor, block_bytes: int) -> np.ndarray:
    blocks, next_row = [], 0
    for start, rows in source_blocks(reader, source, block_bytes):
        assert start == next_row
        next_row += len(rows)
        blocks.append(rows)
    return np.concatenate(blocks)


@pytest.mark.parametrize("architecture", STORED)
def test_block_size_does_not_matter(tmp_path: Path, architecture: str) -> None:
    directory = write_tiny(architecture, tmp_path, num_hidden_layers=1)
    reader = CheckpointReader(directory)
    for source in _sources(directory):
        large = _whole(reader, source, 1 << 30)
        assert large.shape == tuple(dim.size for dim in source.dims)
        for block_bytes in (1, 700, 5000):
            small = _whole(reader, source, block_bytes)
            assert small.dtype == large.dtype
            assert small.tobytes() == large.tobytes(), source.name


def test_blocks_of_each_way_of_storing(tmp_path: Path) -> None:
    """By hand: k of head 1 in GPT-NeoX, k in Phi-3 and GPT-2."""
    directory = write_tiny("GPTNeoXForCausalLM", tmp_path / "neox", num_hidden_layers=1)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    fused = load_file(directory / "model.safetensors")[name]
    k = _k(directory, name)
    np.testing.assert_array_equal(k[16:32], fused[48 + 16 : 48 + 32])  # heads of 16: q, k, v each

    directory = write_tiny("Phi3ForCausalLM", tmp_path / "phi3", num_hidden_layers=1)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    fused = load_file(directory / "model.safetensors")[name]
    np.testing.assert_array_equal(_k(directory, name), fused[96:128])  # 6 heads, 2 KV heads of 16

    directory = write_tiny("GPT2LMHeadModel", tmp_path / "gpt2", num_hidden_layers=1)
    name = "transformer.h.0.attn.c_attn.weight"
    fused = load_file(directory / "model.safetensors")[name]
    np.testing.assert_array_equal(_k(directory, name), fused[:, 96:192].T)


def _k(directory: Path, name: str) -> np.ndarray:
    _, k, _ = (source for source in _sources(directory) if source.name == name)
    return _whole(CheckpointReader(directory), k, 1000)
