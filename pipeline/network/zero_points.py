"""Asymmetric int4: a correction beside the int4 product, which stays as it is for symmetric int4.

    y = x @ (code * s) - sums(x) @ (zero_point * s)

with sums(x) the sum of each group of input features. TensorRT has no int4 zero points; adding them to
the dequantized weight builds, but loses the fused int4 product, and this keeps it. The correction costs
1 / group_size of the product.

Zero points are small integers, stored as float16 without loss: the float32 graph multiplies them by the
scales exactly; in the float16 graph each product is rounded once.

Shapes: N output features, K input features, G = K / group size, B rows, S tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.network.graph import GraphBuilder
from pipeline.network.weights_file import WeightRef


def add_zero_points(
    graph: GraphBuilder, zero_point: WeightRef, scale: WeightRef, x: str, y: str, name: str
) -> str:
    """y - sums(x) @ (zero_point * scale): x [B, S, K], y [B, S, N], zero_point and scale [G, N]."""
    num_groups = scale.shape[0]
    shape = graph.constant(
        f"shape.groups.{num_groups}", np.array([0, 0, num_groups, -1], dtype=np.int64)
    )
    axis = graph.constant("axis.last", np.array([-1], dtype=np.int64))
    groups = graph.node("Reshape", [x, shape], f"{name}.groups")
    sums = graph.node("ReduceSum", [groups, axis], f"{name}.sums", keepdims=0)
    factors = [graph.computed(zero_point), graph.computed(scale)]
    matrix = graph.node("Mul", factors, f"{name}.zero_points")
    correction = graph.node("MatMul", [sums, matrix], f"{name}.correction")
    return graph.node("Sub", [y, correction], f"{name}.corrected")


def rounded_products(
    zero_NG: npt.NDArray[np.int8], scale_NG: npt.NDArray[np.float16]
) -> npt.NDArray[np.float16]:
    """zero_point * scale [G, N] as the float16 graph has it after constants are folded."""
    return np.ascontiguousarray((zero_NG.astype(np.float16) * scale_NG).T)
