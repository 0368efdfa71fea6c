"""Linears and norms of the decoder. Shapes: N output features, K input features, G int4 group size.

    y = rounded(x * input_scale) @ W + bias

Scales of int8 and fp8 are float32 in both graphs, and so is what they scale: TensorRT fuses that into
an integer or fp8 product with a float32 result. Where int4 meets a rounded input (W4A8), the rounded
input goes into the int4 product: W is code * scale, not rounded to fp8 once more as ModelOpt simulates.
"""

from __future__ import annotations

import numpy as np

from pipeline.models.decoder import Norm
from pipeline.network.collectives import add_all_reduce
from pipeline.network.graph import GraphBuilder
from pipeline.network.modules import Linear, NormModule
from pipeline.network.rank_tensors import LinearRef, RankRefs
from pipeline.network.spec import NetworkSpec
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
    stored = weights.linears[linear.module]
    return add_stored_linear(graph, stored, linear.module, x, summed=linear.summed)


def add_stored_linear(
    graph: GraphBuilder, stored: LinearRef, name: str, x: str, *, summed: bool = False
) -> str:
    """The same, given where its tensors lie; the product is a node called `name`.

    Args:
        summed: the products of the tensor-parallel ranks are added before the bias is.
    """
    if stored.input_scale is not None:
        x = graph.node("Mul", [x, graph.computed(stored.input_scale)], f"{name}.input")
    float32 = stored.inputs is not None and stored.weight.dtype != "int4"
    if stored.inputs is not None:
        x = _rounded(graph, x, *stored.inputs, name)
        x = x if float32 else graph.lowered(x, f"{name}.input.{graph.compute}")
    y = graph.node("MatMul", [x, _matrix(graph, stored, name, float32=float32)], name)
    if float32:
        y = graph.lowered(y, f"{name}.{graph.compute}")
    if stored.zero_point is not None:
        assert stored.scale is not None, name
        y = add_zero_points(graph, stored.zero_point, stored.scale, x, y, name)
    if summed:
        y = add_all_reduce(graph, y, name)
    if stored.bias is None:
        return y
    return graph.node("Add", [y, graph.computed(stored.bias)], f"{name}.biased")


def add_softcap(graph: GraphBuilder, x: str, cap: float, name: str) -> str:
    """cap * tanh(x / cap) of a float32 value, called `name`."""
    limit = graph.constant(f"softcap.{cap:g}", np.array(cap, np.float32))
    scaled = graph.node("Div", [x, limit], f"{name}.scaled")
    bent = graph.node("Tanh", [scaled], f"{name}.tanh")
    return graph.node("Mul", [bent, limit], name)


def _rounded(graph: GraphBuilder, x: str, dtype: str, scale: float, name: str) -> str:
    """x as multiples of `scale` that `dtype` can hold, float32; beyond its range the largest."""
    x = graph.raised(x, f"{name}.input.float32")
    factor = graph.constant(f"{name}.activation_scaling_factor", np.array(scale, np.float32))
    codes = graph.node("QuantizeLinear", [x, factor, graph.zero(dtype)], f"{name}.input.codes")
    if graph.compute == "float32":
        # ONNX Runtime 1.31 makes an integer product of any two DequantizeLinear: then it refuses fp8,
        # and int8 saturates at 16 bits on processors without VNNI.
        numbers = graph.cast(codes, "float32", f"{name}.input.numbers")
        return graph.node("Mul", [numbers, factor], f"{name}.input.rounded")
    return graph.node("DequantizeLinear", [codes, factor], f"{name}.input.rounded")


def _matrix(graph: GraphBuilder, stored: LinearRef, name: str, *, float32: bool) -> str:
    """The weight as [K, N], of the compute dtype or as float32."""
    if stored.weight.dtype in ("float16", "float32"):
        # Stored [N, K] as in the checkpoint, so that both can be compared byte for byte.
        return graph.node(
            "Transpose", [graph.computed(stored.weight)], f"{name}.transposed", perm=[1, 0]
        )
    codes, dequantized = graph.stored(stored.weight), f"{name}.dequantized"
    if stored.weight_scale is not None:
        factor = np.array(stored.weight_scale, np.float32)
        scale = graph.constant(f"{name}.weights_scaling_factor", factor)
        matrix = graph.node("DequantizeLinear", [codes, scale], dequantized)
        return matrix if float32 else graph.lowered(matrix, f"{dequantized}.{graph.compute}")
    assert stored.scale is not None, name
    if stored.scale.dtype == "float32":
        scale = graph.stored(stored.scale)
        matrix = graph.node("DequantizeLinear", [codes, scale], dequantized, axis=1)
        return matrix if float32 else graph.lowered(matrix, f"{dequantized}.{graph.compute}")
    group_size = stored.weight.shape[0] // stored.scale.shape[0]
    scale = graph.computed(stored.scale)
    return graph.node(
        "DequantizeLinear", [codes, scale], dequantized, axis=0, block_size=group_size
    )
