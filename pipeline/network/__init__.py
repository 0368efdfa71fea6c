"""The decoder as ONNX (opset 24), built from one rank of a TensorRT-LLM checkpoint.

One definition, two graphs over one weights file: `rank{r}.onnx` computes in float32 and is executed
by ONNX Runtime on the CPU, `rank{r}.trt.onnx` computes in float16 and is parsed by TensorRT.
"""

from pipeline.network.export import (
    cpu_graph_path,
    export_network,
    tensorrt_graph_path,
    weights_path,
)
from pipeline.network.limits import BuildLimits

__all__ = [
    "BuildLimits",
    "cpu_graph_path",
    "export_network",
    "tensorrt_graph_path",
    "weights_path",
]
