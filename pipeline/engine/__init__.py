"""Backends that turn one rank of the network into an engine, and prove what they built.

Light to import: nothing here loads ONNX, ONNX Runtime or TensorRT.
"""

from pipeline.engine.backend import BuildFacts, EngineBackend, RankBackend, error_path, facts_path
from pipeline.engine.engine_config import write_engine_config
from pipeline.engine.onnxruntime_backend import OnnxRuntimeBackend
from pipeline.engine.request import WorkerRequest
from pipeline.engine.tensorrt import TensorRtBackend
from pipeline.engine.tensorrt_llm import TensorRtLlmBackend
from pipeline.engine.tensorrt_rtx import TensorRtRtxBackend

RANK_BACKENDS: dict[str, RankBackend] = {
    backend.name: backend
    for backend in (OnnxRuntimeBackend(), TensorRtRtxBackend(), TensorRtBackend())
}
"""Those that `pipeline.engine.worker` builds one rank with."""
BACKENDS: dict[str, EngineBackend] = {
    **RANK_BACKENDS,
    TensorRtLlmBackend.name: TensorRtLlmBackend(),
}

__all__ = [
    "BACKENDS",
    "RANK_BACKENDS",
    "BuildFacts",
    "EngineBackend",
    "RankBackend",
    "WorkerRequest",
    "error_path",
    "facts_path",
    "write_engine_config",
]
