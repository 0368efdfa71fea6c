"""The decoder, put together from blocks: each a function that adds its nodes to a GraphBuilder.

Shapes: B rows, S tokens per row in this call, M positions that get logits, H hidden size,
C key/value heads of the rank, D head size, T cache positions (max_seq_len), V logits of the rank.
`x` is always the name of a value [B, S, H] (in _head after the choice of positions: [B, M, H]).
"""

from __future__ import annotations

import numpy as np

from pipeline.network.attention import Masks, add_attention, add_masks
from pipeline.network.collectives import add_all_reduce
from pipeline.network.graph import GraphBuilder
from pipeline.network.io_names import (
    HIDDEN_STATES,
    HIDDEN_STATES_OUT,
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
    EMBEDDING_SUM,
    HEAD,
    POSITIONS,
    final_norm,
    layer_modules,
)
from pipeline.network.rank_tensors import RankRefs, first_row
from pipeline.network.spec import NetworkSpec
from pipeline.network.weights_file import WeightRef


def add_decoder(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, cache_length: int
) -> None:
    """The rank's whole network with its inputs and outputs, in the fixed order of the I/O contract."""
    hidden_BSH = ("B", "S", spec.hidden_size)
    if spec.has_embedding:
        graph.input(INPUT_IDS, "int64", ("B", "S"))
    else:
        graph.input(HIDDEN_STATES, graph.compute, hidden_BSH)
    if spec.reads_positions(cache_length):  # TensorRT refuses inputs that nothing reads
        graph.input(POSITION_IDS, "int64", ("B", "S"))
    graph.input(WRITE_INDICES, "int64", ("B",))
    graph.input(KV_LENGTHS, "int64", ("B",))
    if spec.has_head:
        graph.input(LOGIT_POSITIONS, "int64", ("B", "M"))
    cache_BCTD = ("B", spec.rank_kv_heads, cache_length, spec.head_size)
    for layer in range(spec.num_rank_layers):
        for past, _ in cache_names(layer):
            graph.input(past, graph.compute, cache_BCTD)
    masks = add_masks(graph, spec, cache_length)
    x = _embedding(graph, spec, weights) if spec.has_embedding else HIDDEN_STATES
    for layer in range(spec.num_rank_layers):
        x = _decoder_layer(graph, spec, weights, layer, x, masks)
    if spec.has_head:
        num_logits = _head(graph, spec, weights, x)
        graph.output(LOGITS, "float32", ("B", "M", num_logits))
    else:
        graph.node("Identity", [x], HIDDEN_STATES_OUT)
        graph.output(HIDDEN_STATES_OUT, graph.compute, hidden_BSH)
    for layer in range(spec.num_rank_layers):
        for _, present in cache_names(layer):
            graph.output(present, graph.compute, cache_BCTD)


def _embedding(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs) -> str:
    x = _rows(graph, spec, weights, EMBEDDING, INPUT_IDS, EMBEDDING_SUM)
    if spec.features.embedding_scale != 1.0:
        scale = graph.scalar("embedding_scale", spec.features.embedding_scale)
        x = graph.node("Mul", [x, scale], "embedding.scaled")
    if spec.features.learned_positions:
        positions = _rows(graph, spec, weights, POSITIONS, POSITION_IDS, "positions")
        x = graph.node("Add", [x, positions], "embedding.positioned")
    return add_all_reduce(graph, x, EMBEDDING_SUM) if spec.cut_embedding else x


def _rows(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, table: str, indices: str, name: str
) -> str:
    """Gather first, cast after: the table stays float16 in memory."""
    tensor = weights.tensors[table]
    if spec.cut_embedding:
        rows = _held_rows(graph, spec, tensor, indices, name)
    else:
        rows = graph.node("Gather", [graph.stored(tensor), indices], name)
    if graph.compute == tensor.dtype:
        return rows
    return graph.cast(rows, graph.compute, f"{name}.{graph.compute}")


def _held_rows(
    graph: GraphBuilder, spec: NetworkSpec, tensor: WeightRef, indices: str, name: str
) -> str:
    """Rows of the rank's part of a table; zeros where another rank has the row."""
    num_rows = tensor.shape[0]

    def number(kind: str, value: int) -> str:
        return graph.constant(f"{name}.{kind}", np.array(value, np.int64))

    nothing = graph.constant("embedding.nothing", np.array(0, tensor.dtype))
    start = number("first_row", first_row(spec, tensor))
    own_BS = graph.node("Sub", [indices, start], f"{name}.own")
    after_BS = graph.node("GreaterOrEqual", [own_BS, number("zero", 0)], f"{name}.after")
    before_BS = graph.node("Less", [own_BS, number("num_rows", num_rows)], f"{name}.before")
    held_BS = graph.node("And", [after_BS, before_BS], f"{name}.held")
    any_BS = graph.node("Where", [held_BS, own_BS, number("zero", 0)], f"{name}.row")
    rows_BSH = graph.node("Gather", [graph.stored(tensor), any_BS], f"{name}.rows")
    axis = graph.constant("axis.last", np.array([-1], dtype=np.int64))
    held_BS1 = graph.node("Unsqueeze", [held_BS, axis], f"{name}.held.column")
    return graph.node("Where", [held_BS1, rows_BSH, nothing], name)


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


def _head(graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, x: str) -> int:
    """Logits of the asked positions only; returns how many there are for each.

    Where one rank has all rows, those of padding are left out. Of several ranks each gives all of its
    rows, because the last may have none that is a token; who joins them cuts what is too many.
    """
    axis = graph.constant("axis.last", np.array([-1], dtype=np.int64))
    indices_BM1 = graph.node("Unsqueeze", [LOGIT_POSITIONS, axis], "logit_indices")
    x_BMH = graph.node("GatherND", [x, indices_BM1], "logit_states", batch_dims=1)
    normed = add_norm(graph, spec, weights, final_norm(spec), x_BMH)
    stored = weights.linears[HEAD]
    num_logits = spec.vocab_size if spec.mapping.tp == 1 else stored.num_outputs
    logits_only = stored.first_outputs(num_logits)
    cap = spec.features.logit_softcap
    name = LOGITS if cap is None else f"{LOGITS}.uncapped"
    if graph.compute == "float32":
        add_stored_linear(graph, logits_only, name, normed)
    else:
        low = add_stored_linear(graph, logits_only, f"{LOGITS}.{graph.compute}", normed)
        graph.cast(low, "float32", name)
    if cap is not None:
        add_softcap(graph, name, cap, LOGITS)
    return num_logits
