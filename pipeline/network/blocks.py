"""The parts of a decoder, each a function that adds its nodes to a GraphBuilder.

Shapes: B rows, S tokens per row in this call, M positions that get logits, H hidden size,
N query heads, C key/value heads, D head size, T cache positions (max_seq_len), V vocabulary.
`x` is always the name of a value [B, S, H] (in _head after the choice of positions: [B, M, H]).
"""

from __future__ import annotations

import numpy as np

from pipeline.network.graph import GraphBuilder
from pipeline.network.io_names import (
    INPUT_IDS,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.network.rank_tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LayerModules,
    Linear,
    LinearRef,
    RankRefs,
    layer_modules,
    rotary_table_name,
)
from pipeline.network.spec import NetworkSpec


def add_decoder(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, cache_length: int
) -> None:
    """The whole network with its inputs and outputs, in the fixed order of the I/O contract."""
    for name, shape in (
        (INPUT_IDS, ("B", "S")),
        (POSITION_IDS, ("B", "S")),
        (WRITE_INDICES, ("B",)),
        (KV_LENGTHS, ("B",)),
        (LOGIT_POSITIONS, ("B", "M")),
    ):
        graph.input(name, "int64", shape)
    cache_BCTD = ("B", spec.num_kv_heads, cache_length, spec.head_size)
    for layer in range(spec.num_layers):
        for past, _ in cache_names(layer):
            graph.input(past, graph.compute, cache_BCTD)
    x = _embedding(graph, weights)
    for layer in range(spec.num_layers):
        x = _decoder_layer(graph, spec, weights, layer, x)
    _head(graph, spec, weights, x)
    graph.output(LOGITS, "float32", ("B", "M", spec.vocab_size))
    for layer in range(spec.num_layers):
        for _, present in cache_names(layer):
            graph.output(present, graph.compute, cache_BCTD)


def _embedding(graph: GraphBuilder, weights: RankRefs) -> str:
    """Gather first, cast after: the table stays float16 in memory."""
    table = graph.stored(weights.tensors[EMBEDDING])
    rows = graph.node("Gather", [table, INPUT_IDS], "embedding")
    if graph.compute == weights.tensors[EMBEDDING].dtype:
        return rows
    return graph.cast(rows, graph.compute, f"embedding.{graph.compute}")


def _decoder_layer(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, layer: int, x: str
) -> str:
    modules = layer_modules(spec, layer)
    prefix = f"layers.{layer}"
    normed = _rms_norm(graph, spec, weights, modules.input_norm, x)
    attended = _attention(graph, spec, weights, modules, layer, normed)
    x = graph.node("Add", [x, attended], f"{prefix}.attention.residual")
    normed = _rms_norm(graph, spec, weights, modules.post_norm, x)
    fed = _gated_mlp(graph, weights, modules, prefix, normed)
    return graph.node("Add", [x, fed], f"{prefix}.mlp.residual")


def _rms_norm(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, norm: str, x: str) -> str:
    """Computed in float32 whatever the compute dtype (stash_type is 1 by default)."""
    scale = graph.computed(weights.tensors[norm])
    return graph.node(
        "RMSNormalization",
        [x, scale],
        norm.removesuffix(".weight"),
        axis=-1,
        epsilon=spec.norm_epsilon,
    )


def _linear(graph: GraphBuilder, weights: RankRefs, linear: Linear, x: str) -> str:
    return _stored_linear(graph, weights.linears[linear.module], linear.module, x)


def _stored_linear(graph: GraphBuilder, stored: LinearRef, name: str, x: str) -> str:
    if stored.input_scale is not None:
        x = graph.node("Mul", [x, graph.computed(stored.input_scale)], f"{name}.input")
    y = graph.node("MatMul", [x, _matrix(graph, stored, name)], name)
    if stored.bias is None:
        return y
    return graph.node("Add", [y, graph.computed(stored.bias)], f"{name}.biased")


def _matrix(graph: GraphBuilder, stored: LinearRef, name: str) -> str:
    """The weight as [K, N]."""
    if stored.scale is None:
        # Stored [N, K] as in the checkpoint, so that both can be compared byte for byte.
        return graph.node(
            "Transpose", [graph.computed(stored.weight)], f"{name}.transposed", perm=[1, 0]
        )
    group_size = stored.weight.shape[0] // stored.scale.shape[0]
    return graph.node(
        "DequantizeLinear",
        [graph.stored(stored.weight), graph.computed(stored.scale)],
        f"{name}.dequantized",
        axis=0,
        block_size=group_size,
    )


def _attention(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    modules: LayerModules,
    layer: int,
    x: str,
) -> str:
    prefix = f"layers.{layer}.attention"
    query, key, value = _rotated_heads(graph, spec, weights, modules.qkv, prefix, x)
    present = [
        graph.node("TensorScatter", [past, update, WRITE_INDICES], present, axis=2, mode="linear")
        for (past, present), update in zip(cache_names(layer), (key, value), strict=True)
    ]
    # Scaled here, once per query: with Attention's own scale, TensorRT's parser multiplies the
    # query and the whole key cache by its square root in every step.
    scale = graph.scalar("query_scale", spec.head_size**-0.5)
    query = graph.node("Mul", [query, scale], f"{prefix}.query.scaled")
    heads_BNSD = graph.node(
        "Attention",
        [query, *present, "", "", "", KV_LENGTHS],
        prefix,
        is_causal=1,
        scale=1.0,
    )
    heads_BSND = graph.node("Transpose", [heads_BNSD], f"{prefix}.transposed", perm=[0, 2, 1, 3])
    width = graph.constant("shape.flat", np.array([0, 0, -1], dtype=np.int64))
    flat_BSE = graph.node("Reshape", [heads_BSND, width], f"{prefix}.flat")
    return _linear(graph, weights, modules.dense, flat_BSE)


def _rotated_heads(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    qkv: Linear,
    prefix: str,
    x: str,
) -> list[str]:
    """Query [B, N, S, D], key and value [B, C, S, D], query and key rotated.

    The rows of the fused weight are [query heads | key heads | value heads].
    """
    fused = _linear(graph, weights, qkv, x)
    num_heads, num_kv_heads = spec.num_heads, spec.num_kv_heads
    split_shape = np.array([0, 0, num_heads + 2 * num_kv_heads, spec.head_size], dtype=np.int64)
    shape = graph.constant("shape.heads", split_shape)
    heads = graph.node("Reshape", [fused, shape], f"{prefix}.heads")
    heads = graph.node("Transpose", [heads], f"{prefix}.heads.transposed", perm=[0, 2, 1, 3])
    sizes = graph.constant("split.heads", np.array([num_heads, num_kv_heads, num_kv_heads]))
    parts = [f"{prefix}.{part}" for part in ("query", "key", "value")]
    query, key, value = graph.nodes("Split", [heads, sizes], f"{prefix}.split", parts, axis=1)
    tables = [
        graph.stored(weights.tensors[rotary_table_name(part, graph.compute)])
        for part in ("cos", "sin")
    ]
    query, key = (
        graph.node("RotaryEmbedding", [part, *tables, POSITION_IDS], f"{part}.rotated")
        for part in (query, key)
    )
    return [query, key, value]


def _gated_mlp(
    graph: GraphBuilder, weights: RankRefs, modules: LayerModules, prefix: str, x: str
) -> str:
    """proj(silu(fc(x)) * gate(x))."""
    activated = _linear(graph, weights, modules.fc, x)
    sigmoid = graph.node("Sigmoid", [activated], f"{prefix}.mlp.sigmoid")
    activated = graph.node("Mul", [activated, sigmoid], f"{prefix}.mlp.silu")
    linear = _linear(graph, weights, modules.gate, x)
    product = graph.node("Mul", [activated, linear], f"{prefix}.mlp.gated")
    return _linear(graph, weights, modules.proj, product)


def _head(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, x: str) -> None:
    """Logits of the asked positions only, and only of rows that are tokens."""
    axis = graph.constant("axis.last", np.array([-1], dtype=np.int64))
    indices_BM1 = graph.node("Unsqueeze", [LOGIT_POSITIONS, axis], "logit_indices")
    x_BMH = graph.node("GatherND", [x, indices_BM1], "logit_states", batch_dims=1)
    normed = _rms_norm(graph, spec, weights, FINAL_NORM, x_BMH)
    stored = weights.linears[HEAD]
    tokens_only = LinearRef(
        stored.weight.first_rows(spec.vocab_size),
        bias=stored.bias and stored.bias.first_rows(spec.vocab_size),
    )
    if graph.compute == "float32":
        _stored_linear(graph, tokens_only, LOGITS, normed)
    else:
        low = _stored_linear(graph, tokens_only, f"{LOGITS}.{graph.compute}", normed)
        graph.cast(low, "float32", LOGITS)
