"""Rank files of the architectures that ModelOpt cannot export, against slices of transformers' modules.

The expected tensors are made here by hand from the parameters of the module that transformers loads,
following what the module does with them; nothing of our tables is used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress
from tests.tiny_models import write_tiny

Tensors = dict[str, np.ndarray]


def _convert(source: Path, out_dir: Path, tp: int, pp: int = 1, moe_ep: int = 1) -> list[Tensors]:
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, progress=SilentProgress())
    return [load_file(out_dir / f"rank{rank}.safetensors") for rank in range(tp * pp)]


def _config(out_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out_dir / "config.json").read_text())
    return config


def _load(source: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).eval()


def _numpy(parameter: Any) -> np.ndarray:
    values: np.ndarray = parameter.detach().numpy()
    return values


def _rows(x: np.ndarray, tp: int, rank: int) -> np.ndarray:
    return np.split(x, tp)[rank]


def _assert_layer(tensors: Tensors, layer: int, expected: Tensors) -> None:
    """Layer `layer` of a rank holds exactly `expected`."""
    prefix = f"transformer.layers.{layer}."
    held = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    assert held == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[prefix + name], values, err_msg=name)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_phi3(tmp_path: Path, tp: int) -> None:
    source = write_tiny("Phi3ForCausalLM", tmp_path / "hf", num_attention_heads=8, hidden_size=128)
    ranks = _convert(source, tmp_path / "out", tp)
    model = _load(source)
    heads = 8 * 16
    for index, layer in enumerate(model.model.layers):
        qkv = _numpy(layer.self_attn.qkv_proj.weight)
        q, k, v = qkv[:heads], qkv[heads : heads + 32], qkv[heads + 32 :]
        # Phi3MLP: gate, up = gate_up_proj(x).chunk(2); down_proj(up * silu(gate))
        gate, up = (_numpy(half) for half in layer.mlp.gate_up_proj.weight.chunk(2))
        for rank, tensors in enumerate(ranks):
            kv = slice(16 * (rank * 2 // tp), 16 * (rank * 2 // tp + max(2 // tp, 1)))
            expected = {
                "input_layernorm.weight": _numpy(layer.input_layernorm.weight),
                "post_layernorm.weight": _numpy(layer.post_attention_layernorm.weight),
                "attention.qkv.weight": np.concatenate([_rows(q, tp, rank), k[kv], v[kv]]),
                "attention.dense.weight": _rows(
                    _numpy(layer.self_attn.o_proj.weight).T, tp, rank
                ).T,
                "mlp.fc.weight": np.concatenate([_rows(up, tp, rank), _rows(gate, tp, rank)]),
                "mlp.proj.weight": _rows(_numpy(layer.mlp.down_proj.weight).T, tp, rank).T,
            }
            _assert_layer(tensors, index, expected)
    config = _config(tmp_path / "out")
    scaling = model.config.rope_scaling
    assert config["position_embedding_type"] == "long_rope"
    assert config["longrope_scaling_short_factors"] == scaling["short_factor"]
    assert config["longrope_scaling_long_factors"] == scaling["long_factor"]
    assert config["original_max_position_embeddings"] == 32
    assert (config["rotary_pct"], config["rotary_scaling"]) == (0.75, None)
    assert config["hidden_act"] == "swiglu"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_gemma2(tmp_path: Path, tp: int, pp: int) -> None:
    """Values are compared with ModelOpt's; here the norms, the shared head and config.json."""
    source = write_tiny("Gemma2ForCausalLM", tmp_path / "hf", num_hidden_layers=3)
    ranks = _convert(source, tmp_path / "out", tp, pp)
    model = _load(source)
    norms = {
        "input_layernorm": "input_layernorm",
        "post_layernorm": "post_attention_layernorm",
        "pre_feedforward_layernorm": "pre_feedforward_layernorm",
        "post_feedforward_layernorm": "post_feedforward_layernorm",
    }
    for rank, tensors in enumerate(ranks):
        for local, layer in enumerate([[0, 1], [2]][rank // tp] if pp == 2 else [0, 1, 2]):
            for target, name in norms.items():
                module = getattr(model.model.layers[layer], name)
                # Gemma2RMSNorm: output * (1.0 + weight.float())
                expected = (1.0 + module.weight.detach().float()).half().numpy()
                found = tensors[f"transformer.layers.{local}.{target}.weight"]
                np.testing.assert_array_equal(found, expected)
    last = ranks[-1]
    assert ("lm_head.weight" in last) == (pp == 2)
    if pp == 2:
        table = _numpy(model.model.embed_tokens.weight)
        whole = np.concatenate([tensors["lm_head.weight"] for tensors in ranks[tp:]])
        np.testing.assert_array_equal(whole[: len(table)], table)
    config = _config(tmp_path / "out")
    expected_fields = {
        "share_embedding_table": pp == 1,
        "inter_layernorms": True,
        "query_pre_attn_scalar": 20.0,
        "final_logit_softcapping": 25.0,
        "attn_logit_softcapping": 45.0,
        "hidden_act": "gelu_pytorch_tanh",
        "runtime_defaults": {"max_attention_window": [16, 128, 16]},
    }
    assert {key: config[key] for key in expected_fields} == expected_fields


def test_gpt2_saved_from_the_bare_decoder(tmp_path: Path) -> None:
    """As OpenAI's own files: no "transformer." before the names, and the causal masks with them."""
    source = write_tiny("GPT2LMHeadModel", tmp_path / "hf", tie_word_embeddings=True)
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    tensors = load_file(source / "model.safetensors")
    short = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    assert "wte.weight" in short
    for layer in range(3):
        short[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.float32))
    save_file(short, bare / "model.safetensors")
    (ours,) = _convert(bare, tmp_path / "ours", 1)
    (theirs,) = _convert(source, tmp_path / "theirs", 1)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    np.testing.assert_array_equal(
        ours["transformer.layers.0.mlp.fc.weight"], short["h.0.mlp.c_fc.weight"].T
    )
    np.testing.assert_array_equal(ours["lm_head.weight"], short["wte.weight"])
    config = _config(tmp_path / "ours")
    assert config["position_embedding_type"] == "learned_absolute"
    assert (config["gpt_variant"], config["bias"], config["hidden_act"]) == (
        "gpt2",
        True,
        "gelu_new",
    )
    assert "rotary_base" not in config


def _columns(x: np.ndarray, tp: int, rank: int) -> np.ndarray:
    return np.split(x, tp, axis=1)[rank]


def _linear_biased(module: Any) -> tuple[np.ndarray, np.ndarray]:
    return _numpy(module.weight), _numpy(module.bias)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gpt_neox(tmp_path: Path, tp: int) -> None:
    source = write_tiny(
        "GPTNeoXForCausalLM", tmp_path / "hf", num_attention_heads=8, hidden_size=64
    )
    ranks = _convert(source, tmp_path / "out", tp)
    model = _load(source)
    for index, layer in enumerate(model.gpt_neox.layers):
        # GPTNeoXAttention: view(..., heads, 3 * head_size), then chunk(3, dim=-1)
        q, k, v = (
            part.reshape(64, 64)
            for part in np.split(
                _numpy(layer.attention.query_key_value.weight).reshape(8, 24, 64), 3, axis=1
            )
        )
        q_bias, k_bias, v_bias = (
            part.reshape(64)
            for part in np.split(
                _numpy(layer.attention.query_key_value.bias).reshape(8, 24), 3, axis=1
            )
        )
        fc, fc_bias = _linear_biased(layer.mlp.dense_h_to_4h)
        proj, proj_bias = _linear_biased(layer.mlp.dense_4h_to_h)
        dense, dense_bias = _linear_biased(layer.attention.dense)
        for rank, tensors in enumerate(ranks):
            expected = {
                "attention.qkv.weight": np.concatenate([_rows(x, tp, rank) for x in (q, k, v)]),
                "attention.qkv.bias": np.concatenate(
                    [_rows(x, tp, rank) for x in (q_bias, k_bias, v_bias)]
                ),
                "attention.dense.weight": _columns(dense, tp, rank),
                "attention.dense.bias": dense_bias,
                "mlp.fc.weight": _rows(fc, tp, rank),
                "mlp.fc.bias": _rows(fc_bias, tp, rank),
                "mlp.proj.weight": _columns(proj, tp, rank),
                "mlp.proj.bias": proj_bias,
            }
            for name in ("input_layernorm", "post_attention_layernorm"):
                module = getattr(layer, name)
                expected[f"{name}.weight"], expected[f"{name}.bias"] = _linear_biased(module)
            _assert_layer(tensors, index, expected)
    last = _linear_biased(model.gpt_neox.final_layer_norm)
    for tensors in ranks:
        np.testing.assert_array_equal(tensors["transformer.ln_f.weight"], last[0])
        np.testing.assert_array_equal(tensors["transformer.ln_f.bias"], last[1])
    head = np.concatenate([tensors["lm_head.weight"] for tensors in ranks])
    np.testing.assert_array_equal(head[:331], _numpy(model.embed_out.weight))
    config = _config(tmp_path / "out")
    assert (config["rotary_pct"], config["rotary_base"]) == (0.25, 5000.0)


FALCONS: dict[str, dict[str, Any]] = {
    "7b": {"new_decoder_architecture": False, "multi_query": True, "bias": False},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    "falcon2": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "bias": True,
    },
    "multi-head": {
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": None,
        "bias": True,
    },
    "sequential": {
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": False,
        "bias": True,
    },
}
FALCON_NORMS = {
    "7b": {"input_layernorm": "input_layernorm"},
    "40b": {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"},
    "falcon2": {"input_layernorm": "input_layernorm"},
    "multi-head": {"input_layernorm": "input_layernorm"},
    "sequential": {
        "input_layernorm": "input_layernorm",
        "post_layernorm": "post_attention_layernorm",
    },
}


@pytest.mark.parametrize("variant", FALCONS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_falcon(tmp_path: Path, variant: str, tp: int) -> None:
    """q, k and v are what FalconAttention's own splitting makes of the weight's columns."""
    sizes = {"num_attention_heads": 8, "hidden_size": 64}
    source = write_tiny("FalconForCausalLM", tmp_path / "hf", **{**sizes, **FALCONS[variant]})
    ranks = _convert(source, tmp_path / "out", tp)
    model = _load(source)
    biased = FALCONS[variant]["bias"]
    for index, layer in enumerate(model.transformer.h):
        attention = layer.self_attention
        fused = attention.query_key_value.weight.detach().T[None]  # [1, in, rows]
        q, k, v = (part[0].flatten(1).T.numpy() for part in attention._split_heads(fused))
        num_kv_heads = attention.num_kv_heads
        # The new decoder repeats k and v for every query head of a group.
        repeats = 8 // num_kv_heads if variant in ("40b", "falcon2") else 1
        k, v = (x.reshape(num_kv_heads, repeats, 8, 64)[:, 0].reshape(-1, 64) for x in (k, v))
        for rank, tensors in enumerate(ranks):
            first = rank * num_kv_heads // tp
            kv = slice(8 * first, 8 * (first + max(num_kv_heads // tp, 1)))
            expected = {
                "attention.qkv.weight": np.concatenate([_rows(q, tp, rank), k[kv], v[kv]]),
                "attention.dense.weight": _columns(_numpy(attention.dense.weight), tp, rank),
                "mlp.fc.weight": _rows(_numpy(layer.mlp.dense_h_to_4h.weight), tp, rank),
                "mlp.proj.weight": _columns(_numpy(layer.mlp.dense_4h_to_h.weight), tp, rank),
            }
            for target, name in FALCON_NORMS[variant].items():
                weight, bias = _linear_biased(getattr(layer, name))
                expected[f"{target}.weight"], expected[f"{target}.bias"] = weight, bias
            if biased:
                fused_bias = attention.query_key_value.bias.detach()[None, None]
                parts = [part[0].flatten().numpy() for part in attention._split_heads(fused_bias)]
                for at in (1, 2):
                    parts[at] = parts[at].reshape(num_kv_heads, repeats, 8)[:, 0].reshape(-1)
                expected["attention.qkv.bias"] = np.concatenate(
                    [_rows(parts[0], tp, rank), parts[1][kv], parts[2][kv]]
                )
                expected["attention.dense.bias"] = _numpy(attention.dense.bias)
                expected["mlp.fc.bias"] = _rows(_numpy(layer.mlp.dense_h_to_4h.bias), tp, rank)
                expected["mlp.proj.bias"] = _numpy(layer.mlp.dense_4h_to_h.bias)
            _assert_layer(tensors, index, expected)


@pytest.mark.parametrize(("tp", "moe_ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_mixtral(tmp_path: Path, tp: int, moe_ep: int) -> None:
    """tp_rank = moe_tp_rank * moe_ep + moe_ep_rank; experts are contiguous blocks of moe_ep."""
    source = write_tiny(
        "MixtralForCausalLM",
        tmp_path / "hf",
        num_attention_heads=8,
        hidden_size=64,
        num_hidden_layers=1,
    )
    ranks = _convert(source, tmp_path / "out", tp, moe_ep=moe_ep)
    model = _load(source)
    moe = model.model.layers[0].block_sparse_moe
    moe_tp, each = tp // moe_ep, 4 // moe_ep
    prefix = "transformer.layers.0.mlp."
    for rank, tensors in enumerate(ranks):
        slice_, block = rank // moe_ep, rank % moe_ep
        experts = [moe.experts[index] for index in range(block * each, (block + 1) * each)]
        # MixtralBlockSparseTop2MLP: w2(act(w1(x)) * w3(x))
        fc = np.stack(
            [
                np.concatenate(
                    [_rows(_numpy(x.weight), moe_tp, slice_) for x in (expert.w3, expert.w1)]
                )
                for expert in experts
            ]
        )
        proj = np.stack([_columns(_numpy(expert.w2.weight), moe_tp, slice_) for expert in experts])
        np.testing.assert_array_equal(tensors[f"{prefix}fc.weight"], fc)
        np.testing.assert_array_equal(tensors[f"{prefix}proj.weight"], proj)
        router = tensors[f"{prefix}router.weight"]
        assert router.dtype == np.float32
        np.testing.assert_array_equal(router, _numpy(moe.gate.weight).astype(np.float32))
    config = _config(tmp_path / "out")
    assert config["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
    assert config["mapping"] == {
        "world_size": tp,
        "tp_size": tp,
        "pp_size": 1,
        "moe_tp_size": moe_tp,
        "moe_ep_size": moe_ep,
    }
