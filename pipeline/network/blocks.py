"""The decoder, put together from blocks: each a function that adds its nodes to a GraphBuilder.

Shapes: B rows, S tokens per row in this call, M positions that get logits, H hidden size,
C key/value heads, D head size, T cache positions (max_seq_len), V vocabulary.
`x` is always the name of a value [B, S, H] (in _head after the choice of positions: [B, M, H]).
"""

from __future__ import annotations

import numpy as np

from pipeline.network.attention import Masks, add_attention, add_masks
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
from pipeline.network.linear import add_norm, add_softcap, add_stored_linear
from pipeline.network.mlp import add_feed_forward
from pipeline.network.modules import (
    EMBEDDING,
    HEAD,
    POSITIONS,
    final_norm,
    layer_modules,
)
from pipeline.network.rank_tensors import LinearRef, RankRefs
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
    masks = add_masks(graph, spec, cache_length)
    x = _embedding(graph, spec, weights)
    for layer in range(spec.num_layers):
        x = _decoder_layer(graph, spec, weights, layer, x, masks)
    _head(graph, spec, weights, x)
    graph.output(LOGITS, "float32", ("B", "M", spec.vocab_size))
    for layer in range(spec.num_layers):
        for _, present in cache_names(layer):
            graph.output(present, graph.compute, cache_BCTD)


def _embedding(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs) -> str:
    x = _rows(graph, weights, EMBEDDING, INPUT_IDS, "embedding")
    if spec.features.embedding_scale != 1.0:
        scale = graph.scalar("embedding_scale", spec.features.embedding_scale)
        x = graph.node("Mul", [x, scale], "embedding.scaled")
    if spec.features.learned_positions:
        positions = _rows(graph, weights, POSITIONS, POSITION_IDS, "positions")
        x = graph.node("Add", [x, positions], "embedding.positioned")
    return x


def _rows(graph: GraphBuilder, weights: RankRefs, table: str, indices: str, name: str) -> str:
    """Gather first, cast after: the table stays float16 in memory."""
    rows = graph.node("Gather", [graph.stored(weights.tensors[table]), indices], name)
    if graph.compute == weights.tensors[table].dtype:
        return rows
    return graph.cast(rows, graph.compute, f"{name}.{graph.compute}")


def _decoder_layer(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    layer: int,
    x: str,
    masks: Masks,
) -> str:
    """The residual stream through one layer; see Residual for what is added where."""
    modules, residual = layer_modules(spec, layer), spec.features.residual
    prefix = f"layers.{layer}"
    values: dict[str, str] = {}

    def normed(name: str | None, value: str) -> str:
        """One node per norm, also where both branches read it."""
        if name is None:
            return value
        if name not in values:
            values[name] = add_norm(graph, spec, weights, modules.norms[name], value)
        return values[name]

    def added(value: str, branch: str, name: str) -> str:
        return graph.node("Add", [value, branch], f"{prefix}.{name}.residual")

    attended = add_attention(
        graph, spec, weights, layer, normed(residual.before_attention, x), masks
    )
    attended = normed(residual.after_attention, attended)
    after_attention = added(x, attended, "attention")
    mlp_input = x if residual.parallel else after_attention
    fed = add_feed_forward(
        graph, spec, weights, modules, prefix, normed(residual.before_mlp, mlp_input)
    )
    fed = normed(residual.after_mlp, fed)
    return added(after_attention, fed, "mlp")


def _head(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, x: str) -> None:
    """Logits of the asked positions only, and only of rows that are tokens."""
    axis = graph.constant("axis.last", np.array([-1], dtype=np.int64))
    indices_BM1 = graph.node("Unsqueeze", [LOGIT_POSITIONS, axis], "logit_indices")
    x_BMH = graph.node("GatherND", [x, indices_BM1], "logit_states", batch_dims=1)
    normed = add_norm(graph, spec, weights, final_norm(spec), x_BMH)
    stored = weights.linears[HEAD]
    tokens_only = LinearRef(
        stored.weight.first_rows(spec.vocab_size),
        bias=stored.bias and stored.bias.first_rows(spec.vocab_size),
    )
    cap = spec.features.logit_softcap
    name = LOGITS if cap is None else f"{LOGITS}.uncapped"
    if graph.compute == "float32":
        add_stored_linear(graph, tokens_only, name, normed)
    else:
        low = add_stored_linear(graph, tokens_only, f"{LOGITS}.{graph.compute}", normed)
        graph.cast(low, "float32", name)
    if cap is not None:
        add_softcap(graph, name, cap, LOGITS)
