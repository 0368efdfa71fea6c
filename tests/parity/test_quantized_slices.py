"""Rank files of every architecture, format and mapping, plain or quantized, against slices by hand.

Codes and scales are random (tests/made_up_codes.py), and which rows and columns a rank holds is written
down for each architecture in tests/hand_slices.py, without our tables. So this also covers what
ModelOpt cannot export: experts by expert parallelism, GPT-NeoX, int4 with zero points, uneven stages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.layout import mapping_problems
from pipeline.errors import CheckpointError
from pipeline.models import ARCHITECTURES, shape_from_hf
from pipeline.progress import SilentProgress
from pipeline.quant.formats import FORMATS as FORMAT_TABLE
from tests.hand_slices import Rank, layer_slices, sizes_of
from tests.made_up_codes import (
    FORMATS,
    Tensors,
    expected,
    full_config,
    plain_linears,
    write_quantized,
)
from tests.modelopt_exports import write_plain

NUM_LAYERS = 3
# tp, pp, moe_ep
MAPPINGS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 1), (1, 3, 1)]
EXPERTS = [(2, 1, 2), (4, 1, 2), (4, 1, 4), (2, 2, 2)]
QUICK = [(4, 1, 1), (4, 1, 2)]
HEAD_DIM = ("MistralForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM")
CUT_ALIKE = [("int4_awq", tp) for tp in (1, 2, 4)]


def _cases() -> list[Any]:
    """Every format everywhere; those that are cut like int4_awq are mostly slow."""
    mappings = [(name, mapping) for name in sorted(ARCHITECTURES) for mapping in MAPPINGS]
    mappings += [("MixtralForCausalLM", mapping) for mapping in EXPERTS]
    return [
        pytest.param(
            name,
            *mapping,
            fmt,
            marks=() if mapping in QUICK or (fmt, mapping[0]) in CUT_ALIKE else pytest.mark.slow,
        )
        for name, mapping in mappings
        for fmt in ("fp16", *FORMATS)
    ]


Sources = Callable[[str, str, int], tuple[Path, dict[str, Tensors]]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A checkpoint of an architecture in a format, wide enough for tp, and what its linears are."""
    root = tmp_path_factory.mktemp("sources")

    @cache
    def plain(architecture: str, width: int) -> Path:
        sizes = {"hidden_size": width, "num_hidden_layers": NUM_LAYERS}
        if architecture in HEAD_DIM:
            sizes["head_dim"] = width // 8
        return write_plain(architecture, root / f"{architecture}-{width}", **sizes)

    @cache
    def of_width(architecture: str, fmt: str, width: int) -> tuple[Path, dict[str, Tensors]]:
        source = plain(architecture, width)
        if fmt == "fp16":
            return source, plain_linears(source)
        directory = root / f"{architecture}-{width}-{fmt}"
        return directory, write_quantized(source, directory, fmt)

    return lambda architecture, fmt, tp: of_width(architecture, fmt, 512 if tp > 4 else 256)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Numpy has no float8: bytes stand for it."""
    import torch
    from safetensors.torch import load_file

    return {
        name: (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x).numpy()
        for name, x in load_file(path).items()
    }


def _convert(source: Path, out_dir: Path, tp: int, pp: int, moe_ep: int) -> list[dict[str, Any]]:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, progress=SilentProgress())
    return [_read(out_dir / f"rank{rank}.safetensors") for rank in range(tp * pp)]


@pytest.mark.covers("slices")
@pytest.mark.parametrize(("architecture", "tp", "pp", "moe_ep", "fmt"), _cases())
def test_slices(
    tmp_path: Path, sources: Sources, architecture: str, tp: int, pp: int, moe_ep: int, fmt: str
) -> None:
    directory, linears = sources(architecture, fmt, tp)
    ranks = _convert(directory, tmp_path / "out", tp, pp, moe_ep)
    plain_ranks = _convert(sources(architecture, "fp16", tp)[0], tmp_path / "plain", tp, pp, moe_ep)
    sizes = sizes_of(full_config(directory))
    stages = [list(part) for part in np.array_split(np.arange(NUM_LAYERS), pp)]
    for rank, (tensors, plain) in enumerate(zip(ranks, plain_ranks, strict=True)):
        place = Rank(tp, rank % tp, moe_ep)
        found: Tensors = {}
        for local, layer in enumerate(stages[rank // tp]):
            for target, stack in layer_slices(architecture, sizes, layer, place).items():
                module = f"transformer.layers.{local}.{target}"
                del plain[f"{module}.weight"]
                for suffix, values in expected(linears, stack, fmt).items():
                    found[f"{module}.{suffix}"] = values
        # What is no linear, biases included, is as in the plain checkpoint.
        assert tensors.keys() == found.keys() | plain.keys()
        for name, values in {**plain, **found}.items():
            ours = tensors[name]
            assert ours.shape == values.shape, name
            assert ours.tobytes() == values.tobytes(), name


class _Said(SilentProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


def test_experts_of_different_scales_are_noted(tmp_path: Path, sources: Sources) -> None:
    """Two stacks in each of three layers."""
    directory, _ = sources("MixtralForCausalLM", "int4_awq", 1)
    (tmp_path / "out").mkdir()
    progress = _Said()
    convert_checkpoint(directory, tmp_path / "out", tp=1, pp=1, progress=progress)
    assert progress.texts == [
        "6 stacks of experts have a pre-quant scale for each expert: engines made here use them, "
        "TensorRT-LLM uses the first one for all"
    ]


@pytest.mark.parametrize("pp", [1, 2])
def test_routers_are_excluded_by_name(tmp_path: Path, sources: Sources, pp: int) -> None:
    """Numbered within a stage, of which the first has two of three layers."""
    directory, _ = sources("MixtralForCausalLM", "int4_awq", 1)
    _convert(directory, tmp_path / "out", 1, pp, 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    routers = [f"transformer.layers.{layer}.mlp.router" for layer in range([3, 2][pp - 1])]
    assert config["quantization"]["exclude_modules"] == ["lm_head", *routers]


@pytest.mark.parametrize(
    ("architecture", "name", "first", "target"),
    [
        ("LlamaForCausalLM", "self_attn.k_proj", "self_attn.q_proj", "attention.qkv"),
        (
            "MixtralForCausalLM",
            "block_sparse_moe.experts.1.w1",
            "block_sparse_moe.experts.1.w3",
            "mlp.fc",
        ),
    ],
)
def test_fused_linears_must_share_their_pre_quant_scale(
    tmp_path: Path, sources: Sources, architecture: str, name: str, first: str, target: str
) -> None:
    from safetensors.numpy import load_file, save_file

    directory, _ = sources(architecture, "int4_awq", 1)
    shutil.copytree(directory, tmp_path / "source")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.1.{name}.pre_quant_scale"][3] += 1
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        _convert(tmp_path / "source", tmp_path / "out", 1, 1, 1)
    assert str(caught.value) == (
        f"model.layers.1.{name}.pre_quant_scale: differs from "
        f"model.layers.1.{first}.pre_quant_scale, but both become the one scale of a fused linear "
        f"(transformer.layers.1.{target}.prequant_scaling_factor)"
    )


def test_fused_heads_of_an_odd_size_cannot_be_packed(tmp_path: Path) -> None:
    """16 heads of 12 rows are fine, 64 heads of 3 rows are not: a byte would hold rows of two parts."""
    sizes = {"hidden_size": 192, "num_attention_heads": 64, "rotary_pct": 0.9}
    source = write_plain("GPTNeoXForCausalLM", tmp_path / "odd", num_hidden_layers=1, **sizes)
    shape = shape_from_hf(json.loads((source / "config.json").read_text()))
    fmt = FORMAT_TABLE["int4_awq"].with_group_size(64)
    assert [str(problem) for problem in mapping_problems(shape, fmt, 1, 1)] == [
        "format int4_awq: num_attention_heads: 3 consecutive rows of a fused linear are not a "
        "multiple of 2",
        "format int4_awq: num_key_value_heads: 3 consecutive rows of a fused linear are not a "
        "multiple of 2",
    ]
    assert not mapping_problems(shape, FORMAT_TABLE["fp8"], 1, 1)
