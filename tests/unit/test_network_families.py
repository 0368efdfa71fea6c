"""What each family reads from config.json, what it refuses, and what its graph is made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline.checkpoint.trtllm_config import trtllm_config
from pipeline.errors import CheckpointError
from pipeline.models import shape_from_hf
from pipeline.models.decoder import Residual
from pipeline.network import BuildLimits, cpu_graph_path, export_network, tensorrt_graph_path
from pipeline.network.modules import layer_modules
from pipeline.network.rope import LongScaling, Rotary, inverse_frequencies, rotary_tables
from pipeline.network.spec import NetworkSpec
from pipeline.network.spec_reader import read_spec
from pipeline.progress import SilentProgress
from pipeline.quant.formats import FORMATS
from tests.family_checkpoints import random_model, write_checkpoint
from tests.rank_checkpoints import read_rank, write_random_rank, write_rank
from tests.unit.test_architecture_configs import PUBLISHED

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)

SIZES: dict[str, Any] = {
    "dtype": "float16",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 331,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
}


def spec_of(architecture: str, **fields: Any) -> NetworkSpec:
    return read_spec({**SIZES, "architecture": architecture, **fields}, "config.json")


def problems_of(architecture: str, **fields: Any) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        spec_of(architecture, **fields)
    return [str(problem) for problem in caught.value.problems]


def checkpoint_of(directory: Path, architecture: str, **overrides: Any) -> Path:
    return write_checkpoint(random_model(architecture, **overrides), directory)


def graphs_of(checkpoint: Path, out_dir: Path, limits: BuildLimits = LIMITS) -> list[Any]:
    out_dir.mkdir()
    export_network(checkpoint, 0, out_dir, limits, SilentProgress())
    paths = (cpu_graph_path(out_dir, 0), tensorrt_graph_path(out_dir, 0))
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
    return [onnx.load(str(path), load_external_data=False).graph for path in paths]


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"new_decoder_architecture": True},
            Residual(True, "input_layernorm", "mlp_layernorm"),
        ),
        (
            {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
            Residual(True, "input_layernorm", "input_layernorm"),
        ),
        ({"parallel_attention": True}, Residual(True, "input_layernorm", "input_layernorm")),
        ({}, Residual(False, "input_layernorm", "post_layernorm")),
    ],
)
def test_falcon_has_four_topologies(fields: dict[str, Any], expected: Residual) -> None:
    assert spec_of("FalconForCausalLM", **fields).features.residual == expected


def test_windows_are_repeated_over_the_layers() -> None:
    """Gemma 2: every second layer attends to everything, which is max_position_embeddings."""
    windows = {"max_attention_window": [16, 128]}
    spec = spec_of("Gemma2ForCausalLM", runtime_defaults=windows)
    assert [spec.window_of(layer, 64) for layer in range(4)] == [16, None, 16, None]
    assert [spec.window_of(layer, 16) for layer in range(4)] == [None] * 4
    assert [spec.window_of(layer, 17) for layer in range(4)] == [16, None, 16, None]
    assert spec_of("Gemma2ForCausalLM").window_of(0, 64) is None


def test_the_query_scale_of_gemma_2_is_its_own() -> None:
    assert spec_of("Gemma2ForCausalLM", query_pre_attn_scalar=64).query_scale == 0.125
    assert spec_of("GemmaForCausalLM").query_scale == 0.25  # heads of 16


@pytest.mark.parametrize(
    ("architecture", "fields", "problem"),
    [
        (
            "FalconForCausalLM",
            {"position_embedding_type": "alibi_with_scale"},
            "position_embedding_type is 'alibi_with_scale'; allowed: rope_gpt_neox",
        ),
        (
            "GPT2LMHeadModel",
            {"position_embedding_type": "rope_gptj"},
            "position_embedding_type is 'rope_gptj'; allowed: learned_absolute",
        ),
        ("GPT2LMHeadModel", {"q_scaling": 2.0}, "q_scaling is 2.0; allowed: 1.0"),
        (
            "GPTNeoXForCausalLM",
            {"rotary_pct": 0.2},
            "3 rotated channels of heads of 16; allowed: an even number, at most the head size",
        ),
        (
            "GPTNeoXForCausalLM",
            {"rotary_pct": 1.5},
            "rotary_pct is 1.5; allowed: above 0, at most 1",
        ),
        (
            "GPTNeoXForCausalLM",
            {"use_parallel_residual": False},
            "use_parallel_residual is False; allowed: True",
        ),
        (
            "FalconForCausalLM",
            {"num_ln_in_parallel_attn": 3},
            "num_ln_in_parallel_attn is 3; allowed: null, 1, 2",
        ),
        (
            "FalconForCausalLM",
            {"hidden_act": "relu"},
            "hidden_act is 'relu'; allowed: gelu, gelu_pytorch_tanh, gelu_new, gelu_fast",
        ),
        (
            "Gemma2ForCausalLM",
            {"attn_logit_softcapping": -50.0},
            "attn_logit_softcapping is -50.0; allowed: a number above 0",
        ),
        (
            "Gemma2ForCausalLM",
            {"runtime_defaults": {"max_attention_window": [16, 0]}},
            "runtime_defaults: max_attention_window is [16, 0]; allowed: integers, 1 or more",
        ),
        ("GPT2LMHeadModel", {"bias": 1}, "bias is 1; allowed: False, True"),
    ],
)
def test_what_is_not_implemented_is_refused(
    architecture: str, fields: dict[str, Any], problem: str
) -> None:
    (found,) = problems_of(architecture, **fields)
    assert found.removeprefix("config.json: ") == problem


def test_a_mixture_lists_all_its_problems() -> None:
    moe = {"num_experts": 2, "top_k": 3, "normalization_mode": 2}
    assert problems_of("MixtralForCausalLM", hidden_act="swiglu", moe=moe) == [
        "config.json: moe: top_k is 3; allowed: 1 to num_experts 2",
        "config.json: moe: normalization_mode is 2; allowed: 1",
    ]
    assert problems_of("MixtralForCausalLM", hidden_act="swiglu") == [
        "config.json: moe: num_experts is None; allowed: an integer, 1 or more",
        "config.json: moe: top_k is None; allowed: an integer, 1 or more",
    ]


def test_qwen3_must_have_its_norms() -> None:
    (problem,) = problems_of("Qwen3ForCausalLM", hidden_act="silu", qk_layernorm=False)
    assert problem == "config.json: qk_layernorm is False; allowed: True"


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    checkpoint = write_random_rank(
        tmp_path, quantized=False, config={"architecture": "MptForCausalLM"}
    )
    with pytest.raises(CheckpointError) as caught:
        read_spec(json.loads((checkpoint / "config.json").read_text()), "here")
    assert str(caught.value) == (
        "here: architecture is 'MptForCausalLM'; allowed: LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, Phi3ForCausalLM, GemmaForCausalLM, Gemma2ForCausalLM, "
        "GPT2LMHeadModel, GPTNeoXForCausalLM, FalconForCausalLM, MixtralForCausalLM"
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_a_network(model: str) -> None:
    shape = shape_from_hf(PUBLISHED[model])
    spec = read_spec(trtllm_config(shape, FORMATS["int4_awq"], tp=1, pp=1), model)
    assert spec.format_of(layer_modules(spec, 0).mlps[-1].proj.source).quant_algo == "W4A16_AWQ"
    assert spec.head_size == shape.head_size


# --- rotation ------------------------------------------------------------------------------------


LLAMA_3_1_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 2.5}, LLAMA_3_1_SCALING]
)
def test_frequencies_equal_transformers(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {
        "head_size": 128,
        "rotary_base": 500000.0,
        "rotary_scaling": scaling,
        "max_position_embeddings": 131072,
    }
    checkpoint = write_random_rank(tmp_path, quantized=False, config=fields)
    spec = read_spec(json.loads((checkpoint / "config.json").read_text()), "here")
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        rope_theta=500000.0,
        rope_scaling=scaling,
        max_position_embeddings=131072,
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    assert spec.features.rotary is not None
    ours = inverse_frequencies(spec.features.rotary, 131072)
    # transformers computes in float32; largest relative difference seen: 3.3e-7.
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_rotary_tables_at_known_angles() -> None:
    cos_PF, sin_PF = rotary_tables(Rotary(4, 100.0), 3)
    np.testing.assert_allclose(cos_PF[2], [np.cos(2.0), np.cos(0.2)], rtol=1e-15)
    np.testing.assert_allclose(sin_PF[2], [np.sin(2.0), np.sin(0.2)], rtol=1e-15)


def long_rope(**fields: Any) -> NetworkSpec:
    given = {
        "hidden_act": "swiglu",
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": 32,
        "longrope_scaling_short_factors": [1.0] * 8,
        "longrope_scaling_long_factors": [2.0] * 8,
    }
    return spec_of("Phi3ForCausalLM", **{**given, **fields})


def test_long_factors_serve_engines_beyond_the_original_length() -> None:
    rotary = long_rope().features.rotary
    assert rotary is not None
    magnitude = np.sqrt(1 + np.log(4) / np.log(32))
    cos_short_PF, _ = rotary_tables(rotary, 32)
    cos_long_PF, _ = rotary_tables(rotary, 33)
    np.testing.assert_allclose(cos_short_PF[3, 0], np.cos(3.0) * magnitude, rtol=1e-15)
    np.testing.assert_allclose(cos_long_PF[3, 0], np.cos(1.5) * magnitude, rtol=1e-15)


def test_magnitudes_may_be_given() -> None:
    spec = long_rope(longrope_short_mscale=1.25, longrope_long_mscale=1.5)
    assert spec.features.rotary is not None
    scaling = spec.features.rotary.scaling
    assert isinstance(scaling, LongScaling)
    assert (scaling.short_magnitude, scaling.long_magnitude) == (1.25, 1.5)


def test_factors_must_be_one_per_frequency() -> None:
    with pytest.raises(CheckpointError) as caught:
        long_rope(longrope_scaling_long_factors=[2.0] * 7)
    assert str(caught.value) == (
        "config.json: longrope_scaling_long_factors is a list of 7; "
        "allowed: a list of 8 numbers above 0"
    )


# --- tensors -------------------------------------------------------------------------------------


def test_the_tensors_of_a_family_are_required(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", "GPT2LMHeadModel")
    tensors = read_rank(checkpoint)
    del tensors["transformer.position_embedding.weight"]
    del tensors["transformer.layers.1.post_layernorm.bias"]
    tensors["transformer.layers.0.mlp.gate.weight"] = np.ones((160, 96), np.float16)
    config = json.loads((checkpoint / "config.json").read_text())
    write_rank(tmp_path / "broken", tensors, config)
    with pytest.raises(CheckpointError) as caught:
        graphs_of(tmp_path / "broken", tmp_path / "out")
    assert [str(problem).partition("safetensors: ")[2] for problem in caught.value.problems] == [
        "transformer.layers.0.mlp.gate.weight: is not used by the network; fix: remove it",
        "transformer.position_embedding.weight: is missing; allowed: F16 [128, 96]",
        "transformer.layers.1.post_layernorm.bias: is missing; allowed: F16 [96]",
    ]


def test_a_router_is_float32(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(
        tmp_path / "c", "MixtralForCausalLM", num_local_experts=2, num_hidden_layers=1
    )
    tensors = read_rank(checkpoint)
    name = "transformer.layers.0.mlp.router.weight"
    tensors[name] = tensors[name].astype(np.float16)
    config = json.loads((checkpoint / "config.json").read_text())
    write_rank(tmp_path / "broken", tensors, config)
    with pytest.raises(CheckpointError, match=r"router\.weight: is F16 \[2, 96\]; allowed: F32"):
        graphs_of(tmp_path / "broken", tmp_path / "out")


def test_experts_have_names_of_their_own() -> None:
    moe = {"num_experts": 2, "top_k": 1}
    modules = layer_modules(spec_of("MixtralForCausalLM", hidden_act="swiglu", moe=moe), 3)
    assert [linear.module.removeprefix("transformer.layers.3.") for linear in modules.linears] == [
        "attention.qkv",
        "attention.dense",
        "mlp.experts.0.fc",
        "mlp.experts.0.proj",
        "mlp.experts.1.fc",
        "mlp.experts.1.proj",
    ]


# --- graphs --------------------------------------------------------------------------------------


def test_a_mask_is_made_only_where_a_window_can_be_left(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", "MistralForCausalLM", sliding_window=32)
    wide = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=32)
    for graph in graphs_of(checkpoint, tmp_path / "wide", wide):
        for node in graph.node:
            if node.op_type == "Attention":
                assert (node.input[3], _attributes(node)["is_causal"]) == ("", 1)
    for graph in graphs_of(checkpoint, tmp_path / "long"):
        attention = [node for node in graph.node if node.op_type == "Attention"]
        assert [node.input[3] for node in attention] == ["mask.window.32"] * 3
        assert [_attributes(node)["is_causal"] for node in attention] == [0] * 3


def test_a_soft_cap_leaves_no_attention_to_tensorrt(tmp_path: Path) -> None:
    """Its parser refuses the attribute; both graphs use single operations, so the CPU's parity holds."""
    checkpoint = checkpoint_of(tmp_path / "c", "Gemma2ForCausalLM", tie_word_embeddings=True)
    for graph in graphs_of(checkpoint, tmp_path / "out"):
        ops = Counter(node.op_type for node in graph.node)
        assert (ops["Attention"], ops["Softmax"], ops["Tanh"]) == (0, 3, 4)  # one cap for logits
        # Only the layers 0 and 2 have a window, of 4096: no cache here reaches beyond it.
        assert {node.input[0] for node in graph.node if node.op_type == "Where"} == {"mask.causal"}


def test_one_norm_for_both_branches_is_computed_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(
        tmp_path / "c", "FalconForCausalLM", num_attention_heads=3, tie_word_embeddings=True
    )
    for graph in graphs_of(checkpoint, tmp_path / "out"):
        ops = Counter(node.op_type for node in graph.node)
        assert ops["LayerNormalization"] == 3 + 1


def _attributes(node: Any) -> dict[str, Any]:
    return {field.name: onnx.helper.get_attribute_value(field) for field in node.attribute}
