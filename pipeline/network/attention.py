"""Attention over the key/value cache: project, split into heads, rotate, write, attend.

Shapes: B rows, S tokens per row in this call, H hidden size, N query heads and C key/value heads of the
rank, G = N / C, R = G * S rows of one key head, D head size, T cache positions (max_seq_len).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.network.graph import GraphBuilder
from pipeline.network.io_names import (
    KV_LENGTHS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.network.linear import add_linear, add_norm, add_softcap
from pipeline.network.modules import LayerModules, layer_modules
from pipeline.network.rank_tensors import RankRefs, rotary_table_name
from pipeline.network.spec import NetworkSpec

# A score that no query sees: exp() makes exactly 0 of it, and unlike infinity it is a number.
_UNSEEN = -1e30


@dataclass(frozen=True)
class Masks:
    """What the queries of each layer see, bool [B, 1, S, T]; None: as far as is causal.

    ONNX's Attention has a causal mask of its own; it cannot express a window, and a soft cap needs
    the scores between product and mask.
    """

    cache_length: int
    of_layers: tuple[str | None, ...]


def add_masks(graph: GraphBuilder, spec: NetworkSpec, cache_length: int) -> Masks:
    """The masks of all layers, each kind made once."""
    windows = [spec.window_of(layer, cache_length) for layer in range(spec.num_rank_layers)]
    capped = spec.features.attention_softcap is not None
    if not capped and not any(windows):
        return Masks(cache_length, (None,) * spec.num_rank_layers)
    query_B1S1, length_B111, key_T = _positions(graph, cache_length)
    before = graph.node("LessOrEqual", [key_T, query_B1S1], "mask.before")
    valid = graph.node("Less", [key_T, length_B111], "mask.valid")
    seen = graph.node("And", [before, valid], "mask.causal")
    masks: dict[int | None, str | None] = {None: seen if capped else None}
    for window in sorted({window for window in windows if window is not None}):
        size = graph.constant(f"mask.window.{window}.size", np.array(window, np.int64))
        first = graph.node("Sub", [query_B1S1, size], f"mask.window.{window}.before")
        near = graph.node("Greater", [key_T, first], f"mask.window.{window}.near")
        masks[window] = graph.node("And", [seen, near], f"mask.window.{window}")
    return Masks(cache_length, tuple(masks[window] for window in windows))


def _positions(graph: GraphBuilder, cache_length: int) -> tuple[str, str, str]:
    """Position of each query [B, 1, S, 1], valid length [B, 1, 1, 1], every cache position [T]."""
    query_axes = graph.constant("axes.query", np.array([1, 3], np.int64))
    length_axes = graph.constant("axes.length", np.array([1, 2, 3], np.int64))
    bounds = [
        graph.constant(f"mask.key.{name}", np.array(value, np.int64))
        for name, value in (("start", 0), ("stop", cache_length), ("step", 1))
    ]
    return (
        graph.node("Unsqueeze", [POSITION_IDS, query_axes], "mask.query"),
        graph.node("Unsqueeze", [KV_LENGTHS, length_axes], "mask.length"),
        graph.node("Range", bounds, "mask.key"),
    )


def add_attention(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    layer: int,
    x: str,
    masks: Masks,
) -> str:
    """Attention of a layer, its output projection included."""
    prefix, modules = f"layers.{layer}.attention", layer_modules(spec, layer)
    query, key, value = _heads(graph, spec, weights, modules, prefix, x)
    query, key = (
        _rotated(graph, spec, weights, part)
        for part in _normed(graph, spec, weights, modules, query, key)
    )
    present = [
        graph.node("TensorScatter", [past, update, WRITE_INDICES], present, axis=2, mode="linear")
        for (past, present), update in zip(cache_names(layer), (key, value), strict=True)
    ]
    # Scaled here, once per query: with Attention's own scale, TensorRT's parser multiplies the
    # query and the whole key cache by its square root in every step.
    scale = graph.scalar("query_scale", spec.query_scale)
    query = graph.node("Mul", [query, scale], f"{prefix}.query.scaled")
    cap = spec.features.attention_softcap
    if cap is None:
        heads_BNSD = _fused(graph, prefix, query, present, masks.of_layers[layer])
    else:
        heads_BNSD = _capped(graph, spec, layer, query, present, masks, cap)
    heads_BSND = graph.node("Transpose", [heads_BNSD], f"{prefix}.transposed", perm=[0, 2, 1, 3])
    width = graph.constant("shape.flat", np.array([0, 0, -1], dtype=np.int64))
    flat_BSE = graph.node("Reshape", [heads_BSND, width], f"{prefix}.flat")
    return add_linear(graph, weights, modules.dense, flat_BSE)


def _heads(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    modules: LayerModules,
    prefix: str,
    x: str,
) -> list[str]:
    """Query [B, N, S, D], key and value [B, C, S, D].

    The rows of the fused weight are [query heads | key heads | value heads].
    """
    fused = add_linear(graph, weights, modules.qkv, x)
    num_heads, num_kv_heads = spec.rank_heads, spec.rank_kv_heads
    split_shape = np.array([0, 0, num_heads + 2 * num_kv_heads, spec.head_size], dtype=np.int64)
    shape = graph.constant("shape.heads", split_shape)
    heads = graph.node("Reshape", [fused, shape], f"{prefix}.heads")
    heads = graph.node("Transpose", [heads], f"{prefix}.heads.transposed", perm=[0, 2, 1, 3])
    sizes = graph.constant("split.heads", np.array([num_heads, num_kv_heads, num_kv_heads]))
    parts = [f"{prefix}.{part}" for part in ("query", "key", "value")]
    return graph.nodes("Split", [heads, sizes], f"{prefix}.split", parts, axis=1)


def _normed(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    modules: LayerModules,
    query: str,
    key: str,
) -> tuple[str, str]:
    if modules.query_norm is None or modules.key_norm is None:
        return query, key
    query = add_norm(graph, spec, weights, modules.query_norm, query)
    return query, add_norm(graph, spec, weights, modules.key_norm, key)


def _rotated(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, heads: str) -> str:
    rotary = spec.features.rotary
    if rotary is None:
        return heads
    tables = [
        graph.stored(weights.tensors[rotary_table_name(part, graph.compute)])
        for part in ("cos", "sin")
    ]
    partial = rotary.num_channels != spec.head_size
    attributes = {"rotary_embedding_dim": rotary.num_channels} if partial else {}
    return graph.node(
        "RotaryEmbedding", [heads, *tables, POSITION_IDS], f"{heads}.rotated", **attributes
    )


def _fused(
    graph: GraphBuilder, prefix: str, query: str, present: list[str], mask: str | None
) -> str:
    """ONNX's Attention. TensorRT takes a mask or is causal, not both, so a mask is the whole truth."""
    return graph.node(
        "Attention",
        [query, *present, mask or "", "", "", KV_LENGTHS],
        prefix,
        is_causal=int(mask is None),
        scale=1.0,
    )


def _capped(
    graph: GraphBuilder,
    spec: NetworkSpec,
    layer: int,
    query: str,
    present: list[str],
    masks: Masks,
    cap: float,
) -> str:
    """Attention with a soft cap, in single operations: TensorRT's Attention has no cap.

    The G query heads of a key head are joined into rows of one product, so keys are not repeated.
    Scores are float32, because a large score in float16 is coarser than what the cap leaves of it.
    """
    prefix, mask, (keys, values) = f"layers.{layer}.attention", masks.of_layers[layer], present
    assert mask is not None

    def reshaped(x: str, heads: int, last: int, name: str) -> str:
        """From N heads of S rows to C heads of R, or back."""
        sizes = np.array([0, heads, -1, last], np.int64)
        shape = graph.constant(f"shape.{heads}.heads.{last}", sizes)
        return graph.node("Reshape", [x, shape], name)

    num_heads, num_kv_heads = spec.rank_heads, spec.rank_kv_heads
    joined_BCRD = reshaped(query, num_kv_heads, spec.head_size, f"{prefix}.query.joined")
    keys_BCDT = graph.node("Transpose", [keys], f"{prefix}.keys", perm=[0, 1, 3, 2])
    products_BCRT = graph.node("MatMul", [joined_BCRD, keys_BCDT], f"{prefix}.products")
    scores_BNST = reshaped(products_BCRT, num_heads, masks.cache_length, f"{prefix}.scores")
    scores_BNST = graph.raised(scores_BNST, f"{prefix}.scores.float32")
    scores_BNST = add_softcap(graph, scores_BNST, cap, f"{prefix}.scores.capped")
    unseen = graph.constant("mask.unseen", np.array(_UNSEEN, np.float32))
    seen_BNST = graph.node("Where", [mask, scores_BNST, unseen], f"{prefix}.scores.seen")
    shares_BNST = graph.node("Softmax", [seen_BNST], f"{prefix}.shares", axis=-1)
    shares_BNST = graph.lowered(shares_BNST, f"{prefix}.shares.{graph.compute}")
    shares_BCRT = reshaped(shares_BNST, num_kv_heads, masks.cache_length, f"{prefix}.shares.joined")
    heads_BCRD = graph.node("MatMul", [shares_BCRT, values], f"{prefix}.values")
    return reshaped(heads_BCRD, num_heads, spec.head_size, prefix)
