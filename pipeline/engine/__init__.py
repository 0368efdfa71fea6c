"""Backends that turn one rank of the network into an engine, and prove what they built.

Light to import: nothing here loads ONNX, ONNX Runtime or TensorRT.
"""

from pipeline.engine.backend import BuildFacts, EngineBackend, error_path, facts_path
from pipeline.engine.engine_config import write_engine_config
from pipeline.engine.onnxruntime_backend import OnnxRuntimeBackend
from pipeline.engine.request import WorkerRequest
from pipeline.engine.tensorrt_rtx import TensorRtRtxBackend

BACKENDS: dict[str, EngineBackend] = {
    backend.name: backend for backend in (OnnxRuntimeBackend(), TensorRtRtxBackend())
}

__all__ = [
    "BACKENDS",
    "BuildFacts",
    "EngineBackend",
    "WorkerRequest",
    "error_path",
    "facts_path",
    "write_engine_config",
]
