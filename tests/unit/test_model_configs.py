"""Every YAML of configs/: it is planned, fits its target, and has the architecture that it names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.checkpoint.layout import planned_sources
from pipeline.config import HubSource, load_config
from pipeline.models import shape_from_hf
from pipeline.plan import Plan, make_plan
from pipeline.quant.formats import FORMATS
from pipeline.weights import model_shape_fields, override_weights
from pipeline.workspace import Workspace
from tests.machines import AMPLE

CONFIGS = Path(__file__).parents[2] / "configs"
PATHS = sorted(CONFIGS.glob("*.yaml"))

# The numbers of parameters that the Hub shows for the safetensors of each model.
PUBLIC = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
}

# What the issue asks for: name -> (target, tp, pp).
ASKED = {
    "llama2-7b": ("rtx4090", 1, 1),
    "llama2-13b": ("rtx4090", 1, 1),
    "llama2-13b-tp2": ("rtx4090", 2, 1),
    "llama2-13b-tp2pp2": ("rtx4090", 2, 2),
    "llama2-70b-tp4": ("l40s", 4, 1),
    "llama3.1-8b": ("rtx4090", 1, 1),
    "mistral-7b": ("rtx4090", 1, 1),
    "mixtral-8x7b-tp2": ("rtx4090", 2, 1),
    "qwen2.5-7b": ("rtx4090", 1, 1),
    "qwen3-8b": ("rtx4090", 1, 1),
    "llama2-13b-h100-tp2": ("h100-80gb", 2, 1),
    "demo-tp1": ("rtx4090", 1, 1),
    "demo-tp2": ("rtx4090", 2, 1),
    "demo-pp2": ("rtx4090", 1, 2),
    "demo-tp2pp2": ("rtx4090", 2, 2),
}


def _plan(path: Path, root: Path, weights: str | None = None) -> Plan:
    loaded = load_config(path)
    if weights is not None:
        loaded = override_weights(loaded, weights)
    workspace = Workspace(root)
    return make_plan(loaded, workspace.store, workspace.digests(), AMPLE)


@pytest.mark.parametrize("weights", [None, "synthetic"])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_it_is_planned_and_fits(path: Path, weights: str | None, tmp_path: Path) -> None:
    plan = _plan(path, tmp_path, weights)
    assert [str(problem) for problem in plan.problems] == []
    assert plan.forecast is not None
    assert plan.forecast.free_bytes > 0
    config = plan.loaded.config
    assert len(plan.forecast.rank_bytes) == config.mapping.tp * config.mapping.pp
    assert plan.loaded.rehearsal == (weights is not None)


@pytest.mark.parametrize("name", ASKED)
def test_what_was_asked_for_is_there(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").config
    assert (config.target, config.mapping.tp, config.mapping.pp) == ASKED[name]
    assert config.quantize.format == "int4_awq"
    assert config.build.backend == ("tensorrt_llm" if "h100" in name else "tensorrt_rtx")


def num_parameters(config: dict[str, object]) -> int:
    """Of a dense or mixture-of-experts Llama, from the numbers of its config.json alone."""

    def size(name: str, default: int = 0) -> int:
        value = config.get(name, default)
        assert isinstance(value, int)
        return value

    hidden, ffn, heads = (
        size(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head = size("head_dim", hidden // heads)
    q, kv = heads * head, size("num_key_value_heads") * head
    attention = hidden * q + 2 * hidden * kv + q * hidden
    if config["model_type"] == "qwen2":
        attention += q + 2 * kv  # biases
    if config["model_type"] == "qwen3":
        attention += 2 * head  # norms of q and k
    experts = size("num_local_experts")
    mlp = 3 * hidden * ffn
    if experts:
        mlp = experts * mlp + hidden * experts  # and the router
    embeddings = size("vocab_size") * hidden * (1 if config["tie_word_embeddings"] else 2)
    layers = size("num_hidden_layers") * (attention + mlp + 2 * hidden)
    return embeddings + layers + hidden


HUB = [path for path in PATHS if isinstance(load_config(path).config.model, HubSource)]


@pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)
def test_it_has_as_many_parameters_as_the_public_model(path: Path) -> None:
    loaded = load_config(path)
    assert isinstance(loaded.config.model, HubSource)
    fields = model_shape_fields(loaded)
    sources = planned_sources(shape_from_hf(fields), FORMATS["fp16"])
    expected = PUBLIC[loaded.config.model.id]
    assert num_parameters(fields) == expected
    assert sum(math.prod(source.shape) for source in sources) == expected


def test_every_model_of_the_table_has_a_config() -> None:
    models = [load_config(path).config.model for path in HUB]
    assert {model.id for model in models if isinstance(model, HubSource)} == set(PUBLIC)


@pytest.mark.parametrize("family", ["demo", "llama2-13b"])
def test_a_mapping_does_not_repeat_the_quantization(family: str, tmp_path: Path) -> None:
    """Its variants share what their YAML does not change."""
    keys = {
        step.action.key
        for path in PATHS
        if path.stem == family
        or path.stem.startswith(tuple(f"{family}-{way}" for way in ("tp", "pp", "h100")))
        for step in _plan(path, tmp_path).steps
        if step.stage.name == "quantize" and step.action is not None
    }
    assert len(keys) == 1
