"""Which rows and columns of which linears a rank holds, written by hand for every architecture.

After what the modules of transformers do with their weights, and where TensorRT-LLM's modules expect
them; nothing of our tables is used. As numbers of rows and columns, so the same slices hold for codes,
for scales of rows or of groups, and for vectors of input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """Rows and columns of the linear `name`, a module of the Hugging Face model, as [out, in]."""

    name: str
    rows: Indices
    columns: Indices


@dataclass(frozen=True)
class Rank:
    """tp_rank = moe_tp_rank * moe_ep + moe_ep_rank."""

    tp: int
    tp_rank: int
    moe_ep: int = 1


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int = 0


Stack = list[list[Slice]]
"""For each expert of a rank, or once, what is joined along the rows."""
Targets = dict[str, Stack]


def layer_slices(architecture: str, sizes: Sizes, layer: int, rank: Rank) -> Targets:
    """Name of each linear of a layer in a rank file, within the layer -> what it is made of."""
    return _LAYERS[architecture](sizes, layer, rank)


def _share(indices: Indices, parts: int, index: int) -> Indices:
    return np.split(indices, parts)[index]


def _all(size: int) -> Indices:
    return np.arange(size)


def _head_rows(first_head: int, num_heads: int, head_size: int) -> Indices:
    return np.arange(first_head * head_size, (first_head + num_heads) * head_size)


def _q_heads(sizes: Sizes, rank: Rank) -> range:
    each = sizes.heads // rank.tp
    return range(rank.tp_rank * each, (rank.tp_rank + 1) * each)


def _kv_heads(sizes: Sizes, rank: Rank) -> range:
    """With fewer KV heads than ranks, consecutive ranks hold the same one."""
    if sizes.kv_heads >= rank.tp:
        each = sizes.kv_heads // rank.tp
        return range(rank.tp_rank * each, (rank.tp_rank + 1) * each)
    head = rank.tp_rank // (rank.tp // sizes.kv_heads)
    return range(head, head + 1)


def _block(heads: range, head_size: int, before: int = 0) -> Indices:
    """Rows of heads that lie one after the other, behind `before` other heads."""
    return _head_rows(before + heads.start, len(heads), head_size)


def _dense(name: str, sizes: Sizes, rank: Rank) -> Stack:
    return [
        [Slice(name, _all(sizes.hidden), _block(_q_heads(sizes, rank), sizes.head_size))],
    ]


def _column(name: str, sizes: Sizes, rank: Rank) -> Stack:
    return [[Slice(name, _share(_all(sizes.ffn), rank.tp, rank.tp_rank), _all(sizes.hidden))]]


def _row(name: str, sizes: Sizes, rank: Rank) -> Stack:
    return [[Slice(name, _all(sizes.hidden), _share(_all(sizes.ffn), rank.tp, rank.tp_rank))]]


def _attention(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    prefix = f"model.layers.{layer}.self_attn"
    q, kv = _q_heads(sizes, rank), _kv_heads(sizes, rank)
    parts = (("q", q), ("k", kv), ("v", kv))
    return {
        "attention.qkv": [
            [
                Slice(f"{prefix}.{part}_proj", _block(heads, sizes.head_size), _all(sizes.hidden))
                for part, heads in parts
            ]
        ],
        "attention.dense": _dense(f"{prefix}.o_proj", sizes, rank),
    }


def _llama(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    mlp = f"model.layers.{layer}.mlp"
    return {
        **_attention(sizes, layer, rank),
        "mlp.fc": _column(f"{mlp}.gate_proj", sizes, rank),
        "mlp.gate": _column(f"{mlp}.up_proj", sizes, rank),
        "mlp.proj": _row(f"{mlp}.down_proj", sizes, rank),
    }


def _mixtral(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    """w2(act(w1 x) * w3 x): TensorRT-LLM activates the second half of fc."""
    moe_tp = rank.tp // rank.moe_ep
    part, block = divmod(rank.tp_rank, rank.moe_ep)
    each = sizes.experts // rank.moe_ep
    ffn, hidden = _share(_all(sizes.ffn), moe_tp, part), _all(sizes.hidden)
    experts = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for expert in range(block * each, (block + 1) * each)
    ]
    return {
        **_attention(sizes, layer, rank),
        "mlp.fc": [
            [Slice(f"{name}.w3", ffn, hidden), Slice(f"{name}.w1", ffn, hidden)] for name in experts
        ],
        "mlp.proj": [[Slice(f"{name}.w2", hidden, ffn)] for name in experts],
    }


def _phi3(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    """qkv_proj is [q; k; v]; gate_up_proj is [gate; up], and TensorRT-LLM activates the second half."""
    prefix = f"model.layers.{layer}"
    q, kv = _q_heads(sizes, rank), _kv_heads(sizes, rank)
    rows = np.concatenate(
        [
            _block(q, sizes.head_size),
            _block(kv, sizes.head_size, before=sizes.heads),
            _block(kv, sizes.head_size, before=sizes.heads + sizes.kv_heads),
        ]
    )
    ffn = _share(_all(sizes.ffn), rank.tp, rank.tp_rank)
    hidden = _all(sizes.hidden)
    fused = np.concatenate([ffn + sizes.ffn, ffn])
    return {
        "attention.qkv": [[Slice(f"{prefix}.self_attn.qkv_proj", rows, hidden)]],
        "attention.dense": _dense(f"{prefix}.self_attn.o_proj", sizes, rank),
        "mlp.fc": [[Slice(f"{prefix}.mlp.gate_up_proj", fused, hidden)]],
        "mlp.proj": _row(f"{prefix}.mlp.down_proj", sizes, rank),
    }


def _gpt2(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    """c_attn is [q; k; v]."""
    prefix = f"transformer.h.{layer}"
    heads = _q_heads(sizes, rank)
    rows = np.concatenate(
        [_block(heads, sizes.head_size, before=part * sizes.heads) for part in range(3)]
    )
    return {
        "attention.qkv": [[Slice(f"{prefix}.attn.c_attn", rows, _all(sizes.hidden))]],
        "attention.dense": _dense(f"{prefix}.attn.c_proj", sizes, rank),
        "mlp.fc": _column(f"{prefix}.mlp.c_fc", sizes, rank),
        "mlp.proj": _row(f"{prefix}.mlp.c_proj", sizes, rank),
    }


def _grouped(sizes: Sizes, rank: Rank) -> Indices:
    """Rows stored group by group, each the query heads of a KV head, then k, then v."""
    each = sizes.heads // sizes.kv_heads
    groups = np.arange((sizes.heads + 2 * sizes.kv_heads) * sizes.head_size).reshape(
        sizes.kv_heads, each + 2, sizes.head_size
    )
    q, kv = _q_heads(sizes, rank), _kv_heads(sizes, rank)
    queries = groups[:, :each].reshape(sizes.heads, sizes.head_size)
    parts = (
        queries[q.start : q.stop],
        groups[kv.start : kv.stop, each],
        groups[kv.start : kv.stop, each + 1],
    )
    return np.concatenate([part.reshape(-1) for part in parts])


def _gpt_neox(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    prefix = f"gpt_neox.layers.{layer}"
    qkv = Slice(f"{prefix}.attention.query_key_value", _grouped(sizes, rank), _all(sizes.hidden))
    return {
        "attention.qkv": [[qkv]],
        "attention.dense": _dense(f"{prefix}.attention.dense", sizes, rank),
        "mlp.fc": _column(f"{prefix}.mlp.dense_h_to_4h", sizes, rank),
        "mlp.proj": _row(f"{prefix}.mlp.dense_4h_to_h", sizes, rank),
    }


def _falcon(sizes: Sizes, layer: int, rank: Rank) -> Targets:
    prefix = f"transformer.h.{layer}"
    qkv = Slice(
        f"{prefix}.self_attention.query_key_value", _grouped(sizes, rank), _all(sizes.hidden)
    )
    return {
        "attention.qkv": [[qkv]],
        "attention.dense": _dense(f"{prefix}.self_attention.dense", sizes, rank),
        "mlp.fc": _column(f"{prefix}.mlp.dense_h_to_4h", sizes, rank),
        "mlp.proj": _row(f"{prefix}.mlp.dense_4h_to_h", sizes, rank),
    }


_LAYERS: dict[str, Callable[[Sizes, int, Rank], Targets]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
    "GemmaForCausalLM": _llama,
    "Gemma2ForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "Phi3ForCausalLM": _phi3,
    "GPT2LMHeadModel": _gpt2,
    "GPTNeoXForCausalLM": _gpt_neox,
    "FalconForCausalLM": _falcon,
}


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Of a config.json that transformers wrote with every field."""

    def first(*names: str) -> Any:
        return next(config[name] for name in names if config.get(name) is not None)

    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    if config["architectures"] == ["FalconForCausalLM"]:
        if not config["new_decoder_architecture"]:
            kv_heads = 1 if config["multi_query"] else heads
        else:
            kv_heads = config["num_kv_heads"]
    return Sizes(
        hidden=hidden,
        ffn=first("ffn_hidden_size", "intermediate_size", "n_inner"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=config.get("head_dim") or hidden // heads,
        experts=config.get("num_local_experts", 0),
    )
