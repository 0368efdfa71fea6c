"""Linears and norms of the decoder. Shapes: N output features, K input features, G int4 group size."""

from __future__ import annotations

import numpy as np

from pipeline.network.graph import GraphBuilder
from pipeline.network.modules import Linear, NormModule
from pipeline.network.rank_tensors import LinearRef, RankRefs
from pipeline.network.spec import NetworkSpec, Norm
from pipeline.network.zero_points import add_zero_points


def add_norm(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, norm: NormModule, x: str
) -> str:
    """Computed in float32 whatever the compute dtype (stash_type is 1 by default)."""
    vectors = [graph.computed(weights.tensors[name]) for name in norm.vectors]
    op = {Norm.RMS: "RMSNormalization", Norm.LAYER: "LayerNormalization"}[norm.kind]
    return graph.node(op, [x, *vectors], norm.module, axis=-1, epsilon=spec.norm_epsilon)


def add_linear(graph: GraphBuilder, weights: RankRefs, linear: Linear, x: str) -> str:
    """x times the weight, with what the checkpoint has of bias and pre-quant scale."""
    return add_stored_linear(graph, weights.linears[linear.module], linear.module, x)


def add_stored_linear(graph: GraphBuilder, stored: LinearRef, name: str, x: str) -> str:
    """The same, given where its tensors lie; the product is a node called `name`."""
    if stored.input_scale is not None:
        x = graph.node("Mul", [x, graph.computed(stored.input_scale)], f"{name}.input")
    y = graph.node("MatMul", [x, _matrix(graph, stored, name)], name)
    if stored.zero_point is not None:
        assert stored.scale is not None, name
        y = add_zero_points(graph, stored.zero_point, stored.scale, x, y, name)
    if stored.bias is None:
        return y
    return graph.node("Add", [y, graph.computed(stored.bias)], f"{name}.biased")


def add_softcap(graph: GraphBuilder, x: str, cap: float, name: str) -> str:
    """cap * tanh(x / cap) of a float32 value, called `name`."""
    limit = graph.constant(f"softcap.{cap:g}", np.array(cap, np.float32))
    scaled = graph.node("Div", [x, limit], f"{name}.scaled")
    bent = graph.node("Tanh", [scaled], f"{name}.tanh")
    return graph.node("Mul", [bent, limit], name)


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
