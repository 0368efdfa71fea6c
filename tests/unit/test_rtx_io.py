"""Inputs and outputs of a compiled engine, on made-up listings; and the measured memory of a build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.engine.peak_memory import AnonymousPeak, peak_rss_bytes
from pipeline.engine.rtx_io import check_io
from pipeline.errors import GateError

PROFILE = {"x": ((1, 1, 4), (2, 1, 4), (2, 8, 4)), "positions": ((1, 1), (2, 1), (2, 1))}
TEXT = (
    "Layers:\nName: a\n\nI/O Tensors:\n"
    " Name: x, IOMode: Input, DataType: Half, Dimensions: [-1,-1,4], Location: Device, "
    "IsShapeInferenceIO: false, ProfileInfo: [ { MinShape: [1,1,4], OptShape: [2,1,4], MaxShape: "
    "[2,8,4], Format: Row major linear FP16 format (kLINEAR) }]\n"
    " Name: positions, IOMode: Input, DataType: Int64, Dimensions: [-1,1], Location: Device, "
    "IsShapeInferenceIO: false, ProfileInfo: [ { MinShape: [1,1], OptShape: [2,1], MaxShape: [2,1], "
    "Format: Row major linear INT64 format (kLINEAR) }]\n"
    " Name: y, IOMode: Output, DataType: Float, Dimensions: [-1,1,7], Location: Device, "
    "IsShapeInferenceIO: false, ProfileInfo: [ { Format: Row major linear FP32 format (kLINEAR) }]\n"
    "\nEngine Metadata:\n Multi-Device: Disabled\n"
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x [B, S, 4] float16 and positions [B, M] int64 in, y [B, M, 7] float32 out."""
    info = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [],
            "g",
            [
                info("x", TensorProto.FLOAT16, ["B", "S", 4]),
                info("positions", TensorProto.INT64, ["B", "M"]),
            ],
            [info("y", TensorProto.FLOAT, ["B", "M", 7])],
        )
    )
    path = tmp_path / "g.onnx"
    onnx.save(model, str(path))
    return path


def test_an_engine_with_the_inputs_of_its_graph_passes(graph: Path) -> None:
    """One position for each row is all that the limits allow, so the compiler fixes that size."""
    assert check_io(TEXT, graph, PROFILE, "log") == 3


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("Name: x,", "Name: z,", "z: unexpected Input\nlog: x: no such Input"),
        ("DataType: Half", "DataType: Float", "x: Input of Float, expected Input of Half"),
        ("Mode: Output", "Mode: Input", "y: Input of Float, expected Output of Float"),
        ("[-1,1,7]", "[-1,1,8]", "y: shape [-1, 1, 8], expected [-1, -1, 7]"),
        ("[-1,1,7]", "[-1,7]", "y: shape [-1, 7], expected [-1, -1, 7]"),
        (
            "MaxShape: [2,8,4]",
            "MaxShape: [2,9,4]",
            "x: limits [1, 1, 4] [2, 1, 4] [2, 9, 4], expected [1, 1, 4] [2, 1, 4] [2, 8, 4]",
        ),
        ("I/O Tensors:", "Other:", "x: no such Input\nlog: positions: no such Input\n"),
    ],
)
def test_what_differs_is_named(graph: Path, old: str, new: str, problem: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(GateError) as caught:
        check_io(TEXT.replace(old, new), graph, PROFILE, "log")
    assert str(caught.value).startswith(f"log: {problem}")


def test_memory_that_was_given_back_is_in_the_peak() -> None:
    with AnonymousPeak() as before:
        pass
    size = 150_000_000
    with AnonymousPeak() as memory:
        taken = np.ones(size, np.uint8)
        total = int(taken.sum())
        del taken
    assert total == size
    assert before.nbytes is not None
    assert memory.nbytes is not None
    assert 0.9 * size < memory.nbytes - before.nbytes < 1.2 * size
    assert memory.nbytes <= peak_rss_bytes()


def test_pages_of_a_file_are_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000_000))
    with AnonymousPeak() as before:
        pass
    with AnonymousPeak() as memory:
        mapped = np.memmap(path, np.uint8, "r")
        assert int(mapped.sum()) == 0
    assert before.nbytes is not None
    assert memory.nbytes is not None
    assert memory.nbytes - before.nbytes < 50_000_000
