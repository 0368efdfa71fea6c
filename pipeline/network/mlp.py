"""Feed-forward networks: gated, plain, or a mixture of experts.

Shapes: B rows, S tokens per row, E experts, L of them on the rank, K experts per token.
"""

from __future__ import annotations

import numpy as np

from pipeline.models.decoder import Activation, MlpForm
from pipeline.network.collectives import add_all_reduce
from pipeline.network.graph import GraphBuilder
from pipeline.network.linear import add_linear
from pipeline.network.modules import LayerModules, MlpModules
from pipeline.network.rank_tensors import RankRefs
from pipeline.network.spec import NetworkSpec


def add_feed_forward(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    modules: LayerModules,
    prefix: str,
    x: str,
) -> str:
    """The feed-forward network of a layer; `prefix` names its nodes."""
    if spec.features.experts is None:
        return _mlp(graph, spec, weights, modules.mlps[0], f"{prefix}.mlp", x)
    assert modules.router is not None
    shares = _shares(graph, spec, weights, modules.router, f"{prefix}.router", x)
    total = ""
    for expert, mlp, share in zip(spec.rank_experts, modules.mlps, shares, strict=True):
        name = f"{prefix}.experts.{expert}"
        y = _mlp(graph, spec, weights, mlp, name, x)
        y = graph.node("Mul", [y, share], f"{name}.share")
        total = graph.node("Add", [total, y], f"{name}.sum") if total else y
    if spec.mapping.tp == 1:
        return total
    return add_all_reduce(graph, total, modules.mlps[0].proj.source)


def _mlp(
    graph: GraphBuilder,
    spec: NetworkSpec,
    weights: RankRefs,
    modules: MlpModules,
    prefix: str,
    x: str,
) -> str:
    """See MlpForm."""
    form, activation = spec.features.mlp_form, spec.features.activation
    y = add_linear(graph, weights, modules.fc, x)
    if form is MlpForm.PLAIN:
        product = _activated(graph, activation, y, prefix)
    elif form is MlpForm.FUSED:
        sizes = graph.constant("split.fused", np.array([spec.rank_intermediate_size] * 2, np.int64))
        halves = [f"{prefix}.linear", f"{prefix}.activated"]
        linear, y = graph.nodes("Split", [y, sizes], f"{prefix}.split", halves, axis=-1)
        activated = _activated(graph, activation, y, prefix)
        product = graph.node("Mul", [activated, linear], f"{prefix}.gated")
    else:
        assert modules.gate is not None
        activated = _activated(graph, activation, y, prefix)
        linear = add_linear(graph, weights, modules.gate, x)
        product = graph.node("Mul", [activated, linear], f"{prefix}.gated")
    return add_linear(graph, weights, modules.proj, product)


def _activated(graph: GraphBuilder, activation: Activation, y: str, prefix: str) -> str:
    if activation is Activation.SILU:
        sigmoid = graph.node("Sigmoid", [y], f"{prefix}.sigmoid")
        return graph.node("Mul", [y, sigmoid], f"{prefix}.silu")
    approximate = "tanh" if activation is Activation.GELU_TANH else "none"
    return graph.node("Gelu", [y], f"{prefix}.gelu", approximate=approximate)


def _shares(
    graph: GraphBuilder, spec: NetworkSpec, weights: RankRefs, router: str, prefix: str, x: str
) -> list[str]:
    """How much of each expert's answer each token takes: L values [B, S, 1], 0 for those not chosen.

    The router, which every rank has whole, chooses among the experts of all ranks.

    In float32 to the end, because which experts are chosen hangs on it. Every expert is computed for
    every token: the shares, not the graph, say whose answer counts.
    """
    experts = spec.features.experts
    assert experts is not None
    x = graph.raised(x, f"{prefix}.input")
    weight = graph.stored(weights.tensors[router])
    matrix = graph.node("Transpose", [weight], f"{prefix}.transposed", perm=[1, 0])
    rated_BSE = graph.node("MatMul", [x, matrix], f"{prefix}.rated")
    odds_BSE = graph.node("Softmax", [rated_BSE], f"{prefix}.odds", axis=-1)
    top_k = graph.constant("experts.top_k", np.array([experts.top_k], np.int64))
    best_BSK, chosen_BSK = graph.nodes(
        "TopK", [odds_BSE, top_k], f"{prefix}.top", [f"{prefix}.best", f"{prefix}.chosen"], axis=-1
    )
    axis = graph.constant("axis.last", np.array([-1], np.int64))
    sum_BS1 = graph.node("ReduceSum", [best_BSK, axis], f"{prefix}.sum")
    part_BSK = graph.node("Div", [best_BSK, sum_BS1], f"{prefix}.part")
    part_BSK1 = graph.node("Unsqueeze", [part_BSK, axis], f"{prefix}.part.column")
    chosen_BSK1 = graph.node("Unsqueeze", [chosen_BSK, axis], f"{prefix}.chosen.column")
    ids_L = graph.constant("experts.ids", np.array(spec.rank_experts, np.int64))
    is_BSKL = graph.node("Equal", [chosen_BSK1, ids_L], f"{prefix}.is")
    zero = graph.constant("experts.zero", np.array(0, np.float32))
    parts_BSKL = graph.node("Where", [is_BSKL, part_BSK1, zero], f"{prefix}.parts")
    column = graph.constant("axis.chosen", np.array([-2], np.int64))
    shares_BSL = graph.node(
        "ReduceSum", [parts_BSKL, column], f"{prefix}.shares.float32", keepdims=0
    )
    shares_BSL = graph.lowered(shares_BSL, f"{prefix}.shares")
    sizes = graph.constant("split.experts", np.ones(len(spec.rank_experts), np.int64))
    names = [f"{prefix}.share.{expert}" for expert in spec.rank_experts]
    return graph.nodes("Split", [shares_BSL, sizes], f"{prefix}.split", names, axis=-1)
