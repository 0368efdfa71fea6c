"""GraphBuilder: owns the names, nodes, inputs, outputs and external data of one ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from pipeline.network.weights_file import WeightRef, writing

OPSET = 24
# The lowest IR version that may carry opset 24 (onnx.helper.find_min_ir_version_for).
IR_VERSION = 12

_ONNX_DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int4": TensorProto.INT4,
    "int8": TensorProto.INT8,
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "int64": TensorProto.INT64,
}


class GraphBuilder:
    """Builds one graph whose activations have dtype `compute` ("float32" or "float16").

    Every method that adds something returns the name of the value it makes.
    """

    def __init__(self, name: str, compute: str, weights_name: str) -> None:
        self.compute = compute
        self._name = name
        self._weights_name = weights_name
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._values: set[str] = set()

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in `shape` is a dynamic size."""
        self._claim(name)
        self._inputs.append(helper.make_tensor_value_info(name, _ONNX_DTYPES[dtype], list(shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare that the existing value `name` is a graph output."""
        assert name in self._values, name
        self._outputs.append(helper.make_tensor_value_info(name, _ONNX_DTYPES[dtype], list(shape)))

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; the node and its output are called `name`."""
        return self.nodes(op, inputs, name, [name], **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs. An empty input name is an omitted optional input."""
        unknown = [value for value in inputs if value and value not in self._values]
        assert not unknown, (name, unknown)
        for output in outputs:
            self._claim(output)
        self._nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return list(outputs)

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """A small constant kept inside the graph file."""
        if name not in self._initializers:
            self._claim(name)
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def zero(self, dtype: str) -> str:
        """The zero point 0 of a rounding to `dtype`, which says to what is rounded."""
        name = f"zero.{dtype}"
        if name not in self._initializers:
            self._claim(name)
            self._initializers[name] = helper.make_tensor(name, _ONNX_DTYPES[dtype], [], [0])
        return name

    def scalar(self, name: str, value: float) -> str:
        """A scalar of the compute dtype."""
        return self.constant(name, np.array(value, dtype=self.compute))

    def stored(self, tensor: WeightRef) -> str:
        """A tensor of the weights file as it is stored."""
        if tensor.name in self._initializers:
            assert list(self._initializers[tensor.name].dims) == list(tensor.shape), tensor
            return tensor.name
        self._claim(tensor.name)
        proto = TensorProto(name=tensor.name, data_type=_ONNX_DTYPES[tensor.dtype])
        proto.dims.extend(tensor.shape)
        proto.data_location = TensorProto.EXTERNAL
        place = {"location": self._weights_name, "offset": tensor.offset, "length": tensor.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self._initializers[tensor.name] = proto
        return tensor.name

    def computed(self, tensor: WeightRef) -> str:
        """A tensor of the weights file in the compute dtype (a cast, if needed, folded at load)."""
        name = self.stored(tensor)
        if tensor.dtype == self.compute:
            return name
        return self.cast(name, self.compute, f"{name}.{self.compute}")

    def raised(self, value: str, name: str) -> str:
        """`value` of the compute dtype as float32."""
        return value if self.compute == "float32" else self.cast(value, "float32", name)

    def lowered(self, value: str, name: str) -> str:
        """`value` of float32 in the compute dtype."""
        return value if self.compute == "float32" else self.cast(value, self.compute, name)

    def cast(self, value: str, dtype: str, name: str) -> str:
        """`value` converted to `dtype`."""
        if name in self._values:
            return name
        return self.node("Cast", [value], name, to=_ONNX_DTYPES[dtype])

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the graph; `metadata` becomes the model's metadata_props."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            self._outputs,
            list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="trtpipe",
        )
        helper.set_model_props(model, metadata)
        with writing(path):
            path.write_bytes(model.SerializeToString(deterministic=True))

    def _claim(self, name: str) -> None:
        assert name, "a value needs a name"
        assert name not in self._values, name
        self._values.add(name)
