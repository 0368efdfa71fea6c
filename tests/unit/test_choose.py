"""From the YAML's `quantize` section to the format of each linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import read_config
from pipeline.models import ModelShape, shape_from_hf
from pipeline.quant.choose import (
    budget_bits,
    model_format,
    recipe_for,
    split_groups,
    unused_patterns,
)
from pipeline.quant.formats import FORMATS
from tests.tiny_models import write_tiny

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def shape_of(architecture: str, directory: Path) -> ModelShape:
    return shape_from_hf(read_config(write_tiny(architecture, directory, num_hidden_layers=3)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of("LlamaForCausalLM", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    return shape_of("MixtralForCausalLM", tmp_path_factory.mktemp("mixtral"))


def test_all_linears_of_a_layer_become_the_format(llama: ModelShape) -> None:
    recipe = recipe_for(llama, 1, format="int8_sq", group_size=128)
    assert recipe.formats == dict.fromkeys((*ATTENTION, *MLP), "int8_sq")
    assert recipe.algorithms == {"int8_sq": "smoothquant"}


def test_kept_linears_stay_fp16_in_their_layer_only(llama: ModelShape) -> None:
    keep = ("model.layers.2.mlp.down_proj", "*.0.self_attn.?_proj")
    kept = {
        layer: [
            name
            for name, fmt in recipe_for(
                llama, layer, format="int4_awq", group_size=64, keep=keep
            ).formats.items()
            if fmt == "fp16"
        ]
        for layer in range(3)
    }
    assert kept == {0: list(ATTENTION), 1: [], 2: ["mlp.down_proj"]}
    fmt = model_format(llama, format="int4_awq", group_size=64, keep=keep)
    assert (fmt.name, fmt.group_size, len(fmt.exceptions)) == ("int4_awq", 64, 5)
    assert fmt.of("model.layers.2.mlp.down_proj") == FORMATS["fp16"]
    assert fmt.of("model.layers.1.mlp.down_proj") == FORMATS["int4_awq"].with_group_size(64)


def test_mixed_takes_what_was_chosen_and_keeps_what_must_stay(llama: ModelShape) -> None:
    chosen = {
        "model.layers.0.mlp.gate_proj": "int4_awq",
        "model.layers.0.mlp.up_proj": "fp8",
        "model.layers.0.mlp.down_proj": "int8_wo",
    }
    values: dict[str, Any] = {
        "format": "mixed",
        "group_size": 128,
        "keep": ("*.up_proj",),
        "chosen": chosen,
    }
    recipe = recipe_for(llama, 0, algorithm="awq_clip", **values)
    assert [recipe.formats[name] for name in MLP] == ["int4_awq", "fp16", "int8_wo"]
    assert recipe.formats["self_attn.q_proj"] == "fp16"
    # int8 weights cannot be clipped: they are rounded in their usual way.
    assert recipe.algorithms == {"int4_awq": "awq_clip", "int8_wo": "rtn"}
    fmt = model_format(llama, kv_cache="fp8", **values)
    assert fmt.is_mixed
    assert fmt.kv_cache == "fp8"
    assert [part.name for part in fmt.parts] == ["fp16", "int4_awq", "int8_wo"]


def test_linears_that_become_one_are_kept_together(llama: ModelShape) -> None:
    assert split_groups(llama, ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj")) == {}
    split = split_groups(llama, ("model.layers.1.*.v_proj",))
    prefix = "model.layers.1.self_attn."
    group = tuple(f"{prefix}{name}_proj" for name in "qkv")
    assert split == {group: (f"{prefix}v_proj",)}


def test_experts_of_a_layer_are_kept_together(mixtral: ModelShape) -> None:
    assert split_groups(mixtral, ("*.experts.*",)) == {}
    (first, *_) = split_groups(mixtral, ("*.experts.*.w2",))
    assert len(first) == 3 * mixtral.num_experts


def test_patterns_that_name_nothing(llama: ModelShape) -> None:
    keep = ("model.layers.9.*", "lm_head", "*.o_proj", "Model.*")
    assert unused_patterns(llama, keep) == ["model.layers.9.*", "lm_head", "Model.*"]


@pytest.mark.parametrize(
    ("budget", "bits"),
    [("4.5 bits", 4.5), (" 8 bits ", 8.0), ("4.5", None), ("4,5 bits", None), ("-4 bits", None)],
)
def test_budgets(budget: str, bits: float | None) -> None:
    assert budget_bits(budget) == bits
