"""What has one format, what it weighs, and which budgets can be met."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.source import read_config
from pipeline.models import ARCHITECTURES, ModelShape, shape_from_hf
from pipeline.models.linears import decoder_linears, fused_groups
from pipeline.progress import SilentProgress
from pipeline.quant.sensitivity.choice import chosen_formats
from pipeline.quant.sensitivity.groups import (
    budget_problems,
    candidates,
    format_groups,
    mean_bits,
    reachable_bits,
)
from tests.tiny_models import write_tiny

FORMATS = ("int4_awq", "int8_wo", "fp8", "fp16")


def shape_of(architecture: str, directory: Path) -> ModelShape:
    return shape_from_hf(read_config(write_tiny(architecture, directory, num_hidden_layers=2)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    directory = tmp_path_factory.mktemp("llama")
    return shape_from_hf(read_config(write_tiny("Qwen2ForCausalLM", directory, **fields)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_is_in_one_group_with_all_that_are_fused(
    tmp_path: Path, architecture: str
) -> None:
    shape = shape_of(architecture, tmp_path)
    groups = format_groups(shape)
    names = [name for group in groups for name in group.linears]
    assert sorted(names) == sorted(decoder_linears(shape))
    for layer in range(shape.num_layers):
        for fused in fused_groups(shape, layer):
            assert sum(set(fused) <= set(group.linears) for group in groups) == 1
    # The weights of the tables are those of the file.
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        sizes = {name: np.prod(file.get_slice(f"{name}.weight").get_shape()) for name in names}
    for group in groups:
        assert group.num_weights == sum(sizes[name] for name in group.linears)


def test_both_branches_of_a_gated_mlp_are_one_group(llama: ModelShape) -> None:
    first = format_groups(llama)[:4]
    assert [group.kind for group in first] == [
        "attention.qkv",
        "attention.dense",
        "mlp.fc + mlp.gate",
        "mlp.proj",
    ]
    assert first[2].linears == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


def test_bits_are_counted_by_hand(llama: ModelShape) -> None:
    down = format_groups(llama)[3]  # 128 x 256
    weights = 128 * 256
    assert down.bits("fp16", 128) == 16 * weights
    # Codes, a float16 scale for each group of a row, a float16 factor for each input feature.
    assert down.bits("int4_awq", 128) == 4 * weights + 16 * 128 * 2 + 16 * 256
    assert down.bits("int4_awq", 64) == 4 * weights + 16 * 128 * 4 + 16 * 256
    assert down.bits("int8_wo", 128) == 8 * weights + 16 * 128
    assert down.bits("int8_sq", 128) == 8 * weights + 16 * 128 + 16 * 256
    assert down.bits("fp8", 128) == 8 * weights


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "MixtralForCausalLM"])
def test_bits_are_those_of_the_converted_file(tmp_path: Path, architecture: str) -> None:
    source = write_tiny(architecture, tmp_path / "source")
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    bits = 0
    with safe_open(tmp_path / "out" / "rank0.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(
                ("qkv.weight", "dense.weight", "fc.weight", "gate.weight", "proj.weight")
            ):
                bits += 16 * int(np.prod(file.get_slice(name).get_shape()))
    groups = format_groups(shape_from_hf(json.loads((source / "config.json").read_text())))
    assert bits == sum(group.bits("fp16", 128) for group in groups)


def test_one_kept_linear_keeps_its_group(llama: ModelShape) -> None:
    groups = format_groups(llama, ("*.0.mlp.gate_proj",))
    assert [group.kind for group in groups if group.is_kept] == ["mlp.fc + mlp.gate"]
    losses = [{} if g.is_kept else {"int4_awq": 1.0, "fp16": 0.0} for g in groups]
    least, most = reachable_bits(groups, ("int4_awq", "fp16"), 128)
    chosen = chosen_formats(groups, losses, ("int4_awq", "fp16"), 128, least)
    assert {name for name, fmt in chosen.items() if fmt == "fp16"} == set(groups[2].linears)
    assert mean_bits(groups, chosen, 128) == pytest.approx(least)
    assert most == 16


def test_the_budget_is_kept_and_spent_where_it_helps_most(llama: ModelShape) -> None:
    groups = format_groups(llama)
    losses = [
        {"int4_awq": 0.1 + group.layer, "int8_wo": 0.01, "fp8": 0.02, "fp16": 0.0}
        for group in groups
    ]
    last = max(group.layer for group in groups)
    before = 0.0
    for budget in (4.5, 5.0, 6.0, 8.0, 12.0, 16.0):
        chosen = chosen_formats(groups, losses, FORMATS, 128, budget)
        bits = mean_bits(groups, chosen, 128)
        assert before <= bits <= budget
        before = bits
        assert "fp8" not in chosen.values() or budget < 8.2  # as large as int8_wo, nearly
        if budget == 5.0:
            better = {name for name, fmt in chosen.items() if fmt != "int4_awq"}
            assert better
            assert all(f".{last}." in name for name in better)
    assert set(chosen.values()) == {"fp16"}


def test_a_budget_out_of_reach_names_the_range(llama: ModelShape) -> None:
    groups = format_groups(llama)
    (low,) = budget_problems(groups, FORMATS, 128, 4.1)
    assert low.what == "4.1 bits are below the smallest mean that can be reached"
    assert low.allowed == (
        "4.21 to less than 16.00 bits, scales included, with int4_awq, int8_wo, fp8, fp16, groups of 128"
    )
    assert not budget_problems(groups, FORMATS, 128, 4.21)
    (high,) = budget_problems(groups, FORMATS, 128, 16.5)
    assert high.what == "16.5 bits leave every linear in fp16"
    assert budget_problems(groups, FORMATS, 128, 16.0)  # fp16 is a format of its own
    kept = format_groups(llama, ("*.0.*",))
    (problem,) = budget_problems(kept, FORMATS, 128, 5)
    assert problem.allowed.startswith("8.14 to less than 16.00 bits")
    assert problem.allowed.endswith("and these `keep` rules")
    (problem,) = budget_problems(format_groups(llama, ("*",)), FORMATS, 128, 5)
    assert problem.what == "names every linear"


def test_candidates_are_what_the_target_runs() -> None:
    assert candidates("onnxruntime", 80) == ("int4_awq", "int8_wo", "fp8", "fp16")
    assert candidates("tensorrt_rtx", 86) == ("int4_awq", "int8_wo", "fp16")
    assert candidates("tensorrt_rtx", 89) == ("int4_awq", "int8_wo", "fp8", "fp16")
    # TensorRT-LLM takes int8 weights in the layout of one GPU only, so SmoothQuant stands in.
    assert candidates("tensorrt_llm", 90) == ("int4_awq", "int8_sq", "fp8", "fp16")
    assert candidates("tensorrt_llm", 80) == ("int4_awq", "int8_sq", "fp16")
