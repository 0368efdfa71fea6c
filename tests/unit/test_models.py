"""Reading raw Hugging Face configs, and the Llama table against transformers' own parameter names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.layout import planned_sources
from pipeline.errors import CheckpointError
from pipeline.models import RotaryScaling, shape_from_hf
from pipeline.quant.formats import FORMATS

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_llama_2_7b() -> None:
    shape = shape_from_hf(LLAMA_2_7B)
    assert (shape.hidden_size, shape.num_layers, shape.vocab_size) == (4096, 32, 32000)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == (32, 32, 128)
    assert shape.rotary_base == 10000.0  # Llama 2 configs have no rope_theta
    assert shape.rotary_scaling is None
    assert not shape.tie_word_embeddings


def test_llama_3_2_1b() -> None:
    shape = shape_from_hf(LLAMA_3_2_1B)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_size) == (32, 8, 64)
    assert shape.rotary_base == 500000.0
    assert shape.rotary_scaling == RotaryScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert shape.tie_word_embeddings


def test_defaults_of_old_configs() -> None:
    config = {
        name: value
        for name, value in LLAMA_2_7B.items()
        if name not in ("num_key_value_heads", "tie_word_embeddings", "rope_scaling", "hidden_act")
    }
    shape = shape_from_hf(config)
    assert shape.num_kv_heads == 32
    assert not shape.tie_word_embeddings


def test_head_dim_is_not_derived_when_given() -> None:
    assert shape_from_hf({**LLAMA_2_7B, "head_dim": 64}).head_size == 64


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 1e6}, (1e6, None)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (1e4, RotaryScaling("linear", 2.0))),
        ({"rope_scaling": {"type": "dynamic", "factor": 3}}, (1e4, RotaryScaling("dynamic", 3.0))),
        ({"rope_scaling": {"rope_type": "default"}}, (1e4, None)),
        # transformers 5 writes one field; 4.57 would read it as base 10000 without scaling.
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, (5e5, None)),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
            (5e5, RotaryScaling("linear", 4.0)),
        ),
        # Both spellings are fine as long as they agree.
        (
            {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            (5e5, None),
        ),
    ],
)
def test_rotary_comes_from_the_raw_config(
    rope: dict[str, Any], expected: tuple[float, RotaryScaling | None]
) -> None:
    shape = shape_from_hf({**LLAMA_2_7B, **rope})
    assert (shape.rotary_base, shape.rotary_scaling) == expected


LLAMA_3_SCALING = LLAMA_3_2_1B["rope_scaling"]
DEFAULT_ROPE = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("changes", "where", "text"),
    [
        ({"architectures": ["Mamba"]}, "architectures", "'Mamba' is not supported; allowed: "),
        ({"architectures": None}, "architectures", "missing; allowed: one of "),
        ({"architectures": []}, "architectures", "[] is not a list with one class name"),
        ({"architectures": [["A"]]}, "architectures", "[['A']] is not a list with one class"),
        ({"hidden_size": None}, "hidden_size", "missing; allowed: an integer from 1 to 2147483647"),
        ({"hidden_size": "4096"}, "hidden_size", "'4096'; allowed: an integer from 1"),
        ({"vocab_size": True}, "vocab_size", "True; allowed: an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", "allowed: an integer from 1 to 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads", "5 does not divide 32 attention heads"),
        (
            {"hidden_size": 4100},
            "head_dim",
            "missing, and hidden_size 4100 / 32 heads is not whole",
        ),
        ({"head_dim": 63}, "head_dim", "63; allowed: an even number"),
        ({"attention_bias": "no"}, "attention_bias", "'no'; allowed: true, false"),
        ({"mlp_bias": 1}, "mlp_bias", "1; allowed: true, false"),
        (
            {"hidden_act": "gelu"},
            "hidden_act",
            "'gelu' is not supported: the network computes SiLU",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5 is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps", "missing; allowed: a number above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "0; allowed: a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta", "inf; allowed: a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings", "'no'; allowed: true, false"),
        ({"rope_scaling": [2.0]}, "rope_scaling", "[2.0]; allowed: null, a mapping"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type",
            "yarn is not supported; allowed: default, linear, dynamic, llama3",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type", "missing is not supported"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3"}},
            "rope_scaling",
            "rope_type and type disagree: linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "None; allowed: a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 10**400}},
            "rope_scaling.factor",
            f"{'1' + 29 * '0'}...{30 * '0'}; allowed: a number above 0, at most 3e+38: float32 holds it",
        ),
        ({"rope_theta": 10**400}, "rope_theta", "0...0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}},
            "rope_parameters.rope_theta",
            "0...0",
        ),
        ({"rms_norm_eps": 1e39}, "rms_norm_eps", "1e+39; allowed: a number above 0, at most 3e+38"),
        ({"hidden_size": 10**400}, "hidden_size", "0...0"),
        (
            {"rope_scaling": {**LLAMA_3_SCALING, "original_max_position_embeddings": 0.5}},
            "rope_scaling.original_max_position_embeddings",
            "0.5; allowed: an integer from 1 to 2147483647",
        ),
        (
            {"rope_scaling": {**LLAMA_3_SCALING, "low_freq_factor": 4.0}},
            "rope_scaling.low_freq_factor",
            "4.0; allowed: below high_freq_factor 4.0",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, **DEFAULT_ROPE}},
            "rope_theta",
            "10000.0 contradicts rope_parameters, which says 500000.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": DEFAULT_ROPE},
            "rope_scaling",
            "contradicts rope_parameters",
        ),
        (
            {"rope_parameters": {"rope_theta": "big", **DEFAULT_ROPE}},
            "rope_parameters.rope_theta",
            "'big'; allowed: a number above 0",
        ),
    ],
)
def test_errors(changes: dict[str, Any], where: str, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_hf({**LLAMA_2_7B, **changes})
    (problem,) = caught.value.problems
    assert problem.where == f"config.json: {where}"
    assert text in str(problem)


def test_all_problems_at_once() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "relu", "rms_norm_eps": -1}
    with pytest.raises(CheckpointError) as caught:
        shape_from_hf(config)
    wrong = {problem.where.removeprefix("config.json: ") for problem in caught.value.problems}
    assert wrong == {
        "hidden_act",
        "rms_norm_eps",
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_key_value_heads": 1, "num_hidden_layers": 3},
    ],
)
def test_table_names_every_parameter_of_transformers(overrides: dict[str, Any]) -> None:
    """transformers is the judge of names and shapes of the sources."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        **overrides,
    }
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if overrides.get("tie_word_embeddings"):
        del wanted["lm_head.weight"]  # state_dict lists the shared table under both names
    shape = shape_from_hf(json.loads(config.to_json_string(use_diff=False)))
    sources = planned_sources(shape, FORMATS["fp16"])
    assert {source.name: source.shape for source in sources} == wanted


def test_shape_of_a_saved_model(tiny_llama: Path) -> None:
    shape = shape_from_hf(json.loads((tiny_llama / "config.json").read_text()))
    assert (shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_size) == (
        128,
        4,
        2,
        32,
    )
    assert (shape.intermediate_size, shape.vocab_size, shape.max_position_embeddings) == (
        256,
        512,
        256,
    )
    assert shape.norm_epsilon == 1e-5
