"""The plan of every architecture in every format: always typed, and what the stages accept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.checkpoint.convert import checked_source
from pipeline.cli import main
from pipeline.config import FormatName, load_config
from pipeline.errors import PipelineError, Problem
from pipeline.models import ARCHITECTURES, shape_from_hf
from pipeline.network.config_fields import ConfigFields
from pipeline.network.features import read_features
from pipeline.plan import Plan, make_plan
from pipeline.quant.preflight import QuantizeOptions, check_source
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.tiny_models import TINY, tiny_config, write_tiny
from tests.tiny_text import write_tiny_tokenizer

# Whole groups of 64 everywhere: nothing but architecture and format decides.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "vocab_size": 512,
}


def _overrides(architecture: str) -> dict[str, Any]:
    if (
        architecture == "Phi3ForCausalLM"
    ):  # a factor for each of the 12 rotated pairs of 32 channels
        factors = {"short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
        return {**SIZES, "rope_scaling": {"type": "longrope", **factors}}
    if architecture == "FalconForCausalLM":
        fields = {name: value for name, value in SIZES.items() if name != "head_dim"}
        return {**fields, "ffn_hidden_size": 128}
    return SIZES


@pytest.fixture(scope="module", params=TINY)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ of one architecture, where `write_build` looks for them."""
    architecture: str = request.param
    directory = tmp_path_factory.mktemp(architecture) / "weights"
    write_tiny(architecture, directory, **_overrides(architecture))
    write_tiny_tokenizer(directory)
    return directory


def _plan(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests())


def _accepted(weights: Path, fmt: str, out_dir: Path) -> bool:
    """Whether the first stage that knows the format takes these weights."""
    try:
        if fmt == "fp16":
            checked_source(weights, out_dir, tp=1, pp=1)
        else:
            check_source(weights, QuantizeOptions(fmt, 64, 4, 32, 2))
    except PipelineError:
        return False
    return True


@pytest.mark.parametrize("fmt", get_args(FormatName))
def test_the_plan_agrees_with_the_stages(weights: Path, tmp_path: Path, fmt: str) -> None:
    mixed = {"quantize": {"budget": "8 bits"}} if fmt == "mixed" else {}
    plan = _plan(write_build(weights.parent, fmt=fmt, **mixed), tmp_path)
    assert plan.problems == ()
    assert _accepted(weights, fmt, tmp_path)
    assert plan.forecast is not None
    assert plan.forecast.exact is (fmt != "mixed")  # weighed by the budget until formats are chosen


LINEARS = {
    "MixtralForCausalLM": "model.layers.0.block_sparse_moe.experts.0.w2",
    "GPT2LMHeadModel": "transformer.h.0.mlp.c_proj",
}


def _start(problem: Problem) -> str:
    return str(problem).partition(";")[0]


@pytest.mark.parametrize("architecture", LINEARS)
@pytest.mark.parametrize("readable", [True, False])
def test_a_quantized_source_in_a_format_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, readable: bool
) -> None:
    """Every table has every format today; one that lacks it says so."""
    if not readable:
        narrow = replace(ARCHITECTURES[architecture], formats=("fp16",))
        monkeypatch.setitem(ARCHITECTURES, architecture, narrow)
    weights = write_tiny(architecture, tmp_path / "weights", **SIZES)
    write_tiny_tokenizer(weights)
    config = json.loads((weights / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "sym": False,
        "desc_act": False,
    }
    (weights / "config.json").write_text(json.dumps(config))
    plan = _plan(write_build(tmp_path, fmt="int4_gptq"), tmp_path)
    if readable:  # the weights are not what config.json says
        assert all("int4_gptq" not in str(problem) for problem in plan.checkpoint_problems)
        assert f"{LINEARS[architecture]}.weight_scale: missing" in map(_start, plan.problems)
        return
    (problem,) = plan.checkpoint_problems
    assert problem.what == f"{architecture} in int4_gptq is not supported"
    assert plan.config_problems == ()
    assert plan.forecast is None


# As transformers' ACT2FN knows them, and one that it does not.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "silu",
    "swish",
    "tanh",
    "unheard_of",
)
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_network_knows_every_activation_that_the_table_accepts(architecture: str) -> None:
    config = tiny_config(architecture)
    (field, *_) = [name for name in ACTIVATION_FIELDS if config.get(name) is not None]
    accepted = []
    for activation in ACTIVATIONS:
        try:
            shape = shape_from_hf({**config, field: activation})
        except PipelineError:
            continue
        accepted.append(activation)
        fields = ConfigFields(
            {
                **shape.config_fields,
                "architecture": architecture,
                "hidden_act": shape.hidden_act,
                "hidden_size": shape.hidden_size,
                "position_embedding_type": shape.position_embedding,
                "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1},
                "qk_layernorm": shape.qk_norm,
                "max_position_embeddings": 128,
                "original_max_position_embeddings": 128,
                "longrope_scaling_short_factors": [1.0] * 6,
                "longrope_scaling_long_factors": [1.0] * 6,
            },
            "config.json",
        )
        read_features(fields, shape.head_size)
        assert fields.problems == []
    assert accepted
    assert "unheard_of" not in accepted


def _phi3(tmp_path: Path, max_seq_len: int) -> Path:
    weights = write_tiny("Phi3ForCausalLM", tmp_path / "weights", **_overrides("Phi3ForCausalLM"))
    write_tiny_tokenizer(weights)
    return write_build(
        tmp_path, build={"max_seq_len": max_seq_len, "max_input_len": 16}, verify={"seq_len": 16}
    )


@pytest.mark.parametrize(("max_seq_len", "noted"), [(33, True), (32, False)])
def test_an_engine_of_long_rotary_factors_is_noted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    max_seq_len: int,
    noted: bool,
) -> None:
    config = _phi3(tmp_path, max_seq_len)
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--json", str(config)]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert main(["plan", str(config)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert ("note: longrope: " in page) is noted
    if not noted:
        assert notes == []
        return
    (note,) = notes
    assert note.startswith(
        "longrope: build.max_seq_len 33 is above original_max_position_embeddings 32, so the engine "
        "uses the long factors for every prompt"
    )
    assert note in page
