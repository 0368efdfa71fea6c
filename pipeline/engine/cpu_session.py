"""A graph, or a part of one, loaded by ONNX Runtime for the CPU, and arrays bound to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import GateError, Problem

# ONNX Runtime's own default (4) rounds activations to int8 before every int4 matrix product: about
# 1.7 times faster, but no longer the checkpoint's numbers. 0 keeps float32 activations.
EXACT = 0

Array = npt.NDArray[Any]


def load_session(
    path: Path,
    num_threads: int | None,
    accuracy_level: int = EXACT,
    part: bytes | None = None,
) -> Any:
    """An onnxruntime.InferenceSession.

    Args:
        path: the graph, beside the weights file that it points into.
        num_threads: of one matrix product; None: every core.
        part: a serialized model of some of the graph's nodes, to be loaded in its place.

    Raises:
        GateError: files missing, truncated, or nothing that ONNX Runtime executes.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    model: str | bytes = str(path)
    if part is not None:
        model = part
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    refusals = (
        ort_errors.Fail,
        ort_errors.InvalidArgument,
        ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf,
        ort_errors.NoSuchFile,
        ort_errors.NotImplemented,
        ort_errors.RuntimeException,
    )
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except refusals as error:
        # Nested reports: the innermost says what is wrong, the outer ones where in ONNX Runtime.
        cause = str(error).rpartition("[ONNXRuntimeError] : ")[2].strip()
        problem = Problem(str(path), f"ONNX Runtime cannot load it: {cause}", fix="build again")
        raise GateError(problem) from error


def bind_input(binding: Any, name: str, array: Array) -> None:
    """Let the session read an array in place; it must be in C order and live until the run is over."""
    assert array.flags.c_contiguous, name
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_output(binding: Any, name: str, array: Array) -> None:
    """Let the session write into an array; past and present of a cache may be the same one."""
    assert array.flags.c_contiguous, name
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_cache(binding: Any, past: str, present: str, array: npt.NDArray[np.float32]) -> None:
    """The same memory on both sides: the update is done in place, nothing is copied."""
    bind_input(binding, past, array)
    bind_output(binding, present, array)
