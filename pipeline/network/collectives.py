"""Where the tensor-parallel ranks of a stage add up what each of them has a part of.

In both graphs such a place is an `Identity` node called "<what is summed>.all_reduce": TensorRT's
lowering puts a collective there, and on the CPU the graph is cut there. The ranks that take part are
those of one stage, in tp_rank order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.network.modules import EMBEDDING_SUM, layer_modules
from pipeline.network.spec import NetworkSpec

if TYPE_CHECKING:
    from pipeline.network.graph import GraphBuilder

ALL_REDUCE = ".all_reduce"


def add_all_reduce(graph: GraphBuilder, x: str, name: str) -> str:
    """The sum of `x` over the tensor-parallel ranks, once it is lowered."""
    return graph.node("Identity", [x], f"{name}{ALL_REDUCE}")


def all_reduce_names(spec: NetworkSpec) -> tuple[str, ...]:
    """Every all-reduce of a rank's graphs, in the order of execution; none with one rank per stage."""
    if spec.mapping.tp == 1:
        return ()
    summed = [EMBEDDING_SUM] if spec.has_embedding and spec.cut_embedding else []
    for layer in range(spec.num_rank_layers):
        modules = layer_modules(spec, layer)
        summed += [modules.dense.module, modules.mlps[0].proj.source]
    return tuple(f"{name}{ALL_REDUCE}" for name in summed)
