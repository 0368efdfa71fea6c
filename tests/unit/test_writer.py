"""The writer against the safetensors library's own bytes, and its refusal of anything incomplete."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import SafetensorsWriter, TensorSpec, file_bytes
from pipeline.errors import CheckpointError, ExitCode, StageError

VALUES = {
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a.weight": np.arange(4, dtype=np.int8).reshape(4, 1),
    "c.scale": np.array([[1.5], [2.5]], np.float32),
    "z": np.array([7], np.int64),
    "bytes": np.array([1, 2, 3], np.uint8),
    "long": np.array([1], np.int32),
    "double": np.array([1.0]),
    "empty": np.zeros((0, 3), np.float16),
}
DTYPES = {"float16": "F16", "int8": "I8", "float32": "F32", "int64": "I64", "uint8": "U8"}
DTYPES |= {"int32": "I32", "float64": "F64"}
SPECS = [TensorSpec(name, DTYPES[str(x.dtype)], x.shape) for name, x in VALUES.items()]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_same_bytes_as_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, SPECS, metadata) as writer:
        for name, x in reversed(VALUES.items()):
            writer.write(name, x)
    wanted = save(VALUES, metadata)
    assert path.read_bytes() == wanted
    assert file_bytes(SPECS, metadata) == len(wanted)


def test_rows_in_any_order(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [TensorSpec("x", "F32", (10, 3))]) as writer:
        for first in (4, 0, 7):
            writer.write_rows("x", first, x[first : {0: 4, 4: 7, 7: 10}[first]])
    np.testing.assert_array_equal(load_file(path)["x"], x)


def test_columns_of_a_larger_array_are_written_as_they_look(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [TensorSpec("x", "F32", (3, 2))]) as writer:
        writer.write("x", x[:, 1:3])
    np.testing.assert_array_equal(load_file(path)["x"], x[:, 1:3])


def test_bfloat16(tmp_path: Path) -> None:
    x = np.array([1.0, -2.5], ml_dtypes.bfloat16)
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, [TensorSpec("x", "BF16", (2,))]) as writer:
        writer.write("x", x)
    assert path.read_bytes() == save({"x": x})


def test_a_missing_tensor_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(AssertionError, match=r"not written: \{'b.weight': 12\}"),
        SafetensorsWriter(path, [SPECS[0], SPECS[1]]) as writer,
    ):
        writer.write("a.weight", VALUES["a.weight"])
    assert not path.exists()


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(KeyError), SafetensorsWriter(path, SPECS[:1]) as writer:
        writer.write("unknown", VALUES["z"])
    assert not path.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 3), np.float32),  # dtype
        np.zeros((3, 2), np.float16),  # shape
    ],
)
def test_wrong_tensor(tmp_path: Path, wrong: np.ndarray) -> None:
    with (
        pytest.raises(AssertionError, match=r"b\.weight"),
        SafetensorsWriter(tmp_path / "x.safetensors", SPECS[:1]) as writer,
    ):
        writer.write("b.weight", wrong)


def test_written_twice(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", SPECS[:1]) as writer:
        writer.write("b.weight", VALUES["b.weight"])
        with pytest.raises(AssertionError, match=r"b\.weight is written twice"):
            writer.write_rows("b.weight", 0, VALUES["b.weight"][:1])


def test_declared_twice(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="declared twice"):
        SafetensorsWriter(tmp_path / "x.safetensors", [SPECS[0], SPECS[0]])
    assert not list(tmp_path.iterdir())


def test_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(VALUES, path)
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, SPECS)
    assert path.exists()


def test_a_file_that_is_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    """As if the process were killed: everything is written but the end was never reached."""
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, SPECS[:1])
    writer.write("b.weight", VALUES["b.weight"])
    with pytest.raises(CheckpointError, match="an empty header: the file was never finished"):
        CheckpointReader(path)


def test_disk_too_small(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(StageError) as caught:
        SafetensorsWriter(path, [TensorSpec("x", "F32", (2**50,))])
    assert caught.value.exit_code is ExitCode.STAGE
    assert f"{path}: needs {8 + 88 + 2**52} bytes, " in str(caught.value)
    assert "are free on the disk; fix: make room" in str(caught.value)
    assert not path.exists()
