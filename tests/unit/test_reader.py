"""Every way in which a safetensors directory can be wrong, and that data come back exactly."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError, ExitCode


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def problems_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path)
    assert caught.value.exit_code is ExitCode.CHECKPOINT
    return str(caught.value)


def test_reads_what_transformers_wrote(tiny_llama: Path) -> None:
    reader = CheckpointReader(tiny_llama)
    wanted = load_file(tiny_llama / "model.safetensors")
    assert reader.tensors.keys() == wanted.keys()
    for name, values in wanted.items():
        info = reader.tensors[name]
        assert (info.dtype, info.shape, info.nbytes) == ("F16", values.shape, values.nbytes)
        np.testing.assert_array_equal(reader.read(name), values)


def test_every_dtype(tmp_path: Path) -> None:
    values = {
        "f64": np.array([[1.5, -2.0]]),
        "f32": np.array([1e30, 2.0], np.float32),
        "f16": np.array([1.0, 65504.0], np.float16),
        "i64": np.array([-(2**62)]),
        "i8": np.array([-8, 7], np.int8),
        "u8": np.array([255], np.uint8),
        "bool": np.array([True, False]),
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(values, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for name, wanted in values.items():
        got = reader.read(name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def test_bfloat16_as_torch_wrote_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    values = torch.tensor([[1.0, -3.0e38], [0.1, float("inf")]], dtype=torch.bfloat16)
    save_torch({"x": values}, tmp_path / "model.safetensors")
    got = CheckpointReader(tmp_path).read("x")
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), values.float().numpy())


def test_rows_and_blocks(tmp_path: Path) -> None:
    x = np.arange(70, dtype=np.int32).reshape(10, 7)
    save_file({"pad": np.zeros(3, np.float64), "x": x}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path / "model.safetensors")  # a single file works too
    np.testing.assert_array_equal(reader.read_rows("x", 2, 5), x[2:5])
    # 28 bytes a row: three rows fit into 90 bytes
    blocks = list(reader.row_blocks("x", block_bytes=90))
    assert [first for first, _ in blocks] == [0, 3, 6, 9]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), x)
    # a row larger than a block still comes whole
    assert len(list(reader.row_blocks("x", block_bytes=1))) == 10


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        (b"[1]", b"", "the header is not valid JSON: a JSON list instead of an object"),
        (b'{"x":', b"", "the header is not valid JSON"),
        (b"\xff\xfe{}", b"", "the header is not valid JSON"),
        (b'{"x":1,"x":2}', b"", "the key 'x' appears twice"),
        (b"[" * 100_000, b"", "the header is not valid JSON: nested too deeply"),
        ({"x": 5}, b"", ": x: its header entry is 5, not an object"),
        ({"x": entry("F3", [1], 0, 1)}, b"1", ": x: dtype 'F3'; allowed: BOOL, U8"),
        ({"x": entry("F32", [-1], 0, 4)}, b"1234", ": x: shape [-1]; allowed: a list of integers"),
        ({"x": entry("F32", [True], 0, 4)}, b"1234", ": x: shape [True]"),
        ({"x": entry("F32", [1], 4, 0)}, b"1234", "data_offsets [4, 0]; allowed: [begin, end]"),
        (
            {"x": entry("F32", [2], 0, 4)},
            b"1234",
            "F32 [2] needs 8 bytes, data_offsets [0, 4] have 4",
        ),
        ({"x": entry("F32", [10**30], 0, 4)}, b"1234", "data_offsets [0, 4] have 4"),
        ({"x": entry("F32", [2], 0, 8)}, b"1234", "the tensors need"),
        ({"x": entry("F32", [1], 0, 4)}, b"12345", "1 bytes at the end belong to no tensor"),
        ({"x": entry("U8", [2], 1, 3)}, b"123", "1 bytes before its data belong to no tensor"),
        (
            {"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)},
            b"123",
            ": y: its data overlaps the tensor before it",
        ),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__: {'a': 1}; allowed: text for each key"),
        ({"a\nb": entry("U8", [1], 0, 1)}, b"1", "'a\\nb' is not a tensor name"),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, data: bytes, text: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    message = problems_of(tmp_path)
    assert text in message
    assert str(path) in message


def test_too_short_and_lying_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "0 bytes: too short for a safetensors file" in problems_of(tmp_path)
    write_raw(path, {}, length=10**12)
    assert "the header claims 1000000000000 bytes, the file has 10: truncated" in problems_of(
        tmp_path
    )


def test_truncated_download(tiny_llama: Path, tmp_path: Path) -> None:
    data = (tiny_llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1000])
    message = problems_of(tmp_path)
    assert (
        f"the tensors need {len(data)} bytes, the file has {len(data) - 1000}: truncated" in message
    )
    assert "fix: copy or download the file again" in message


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1000, np.float32)}, path)
    reader = CheckpointReader(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="x: the file ends inside the tensor: it changed"):
        reader.read("x")


def test_missing_directory_and_files(tmp_path: Path) -> None:
    assert "no such directory" in problems_of(tmp_path / "nowhere")
    assert "neither model.safetensors nor model.safetensors.index.json" in problems_of(tmp_path)
    loop = tmp_path / "model.safetensors"
    loop.symlink_to(loop)
    assert "a symbolic link that leads nowhere or in a circle" in problems_of(tmp_path)


def write_sharded(directory: Path, weight_map: Any, **files: dict[str, np.ndarray]) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE = {"x": np.zeros(2, np.float32)}
TWO = {"y": np.ones(3, np.float32)}


def test_sharded(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=ONE, b=TWO)
    reader = CheckpointReader(tmp_path)
    assert {name: info.file.name for name, info in reader.tensors.items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }
    np.testing.assert_array_equal(reader.read("y"), TWO["y"])


@pytest.mark.parametrize(
    ("weight_map", "texts"),
    [
        ({}, ["no weight_map"]),
        ([], ["no weight_map"]),
        ({"x": "gone.safetensors"}, ["x is said to be in gone.safetensors, which is missing"]),
        (
            {"x": "../a.safetensors"},
            ["'../a.safetensors'; allowed: a .safetensors file name without"],
        ),
        (
            {"x": "/a.safetensors", "y": "c/b.safetensors"},
            ["'/a.safetensors'", "'c/b.safetensors'"],
        ),
        ({"x": 7}, ["x is said to be in 7; allowed"]),
        ({"x": "a" * 300 + ".safetensors"}, ["allowed: a .safetensors file name"]),
        ({"x": "a\ud800.safetensors"}, ["allowed: a .safetensors file name"]),
        ({"x": "a.safetensors"}, []),
        (
            {"x": "a.safetensors", "z": "a.safetensors"},
            ["z is said to be in a.safetensors, which lacks it"],
        ),
        (
            {"x": "b.safetensors", "y": "a.safetensors"},
            ["x is said to be in b.safetensors, but is in a.safetensors", "y is said to be"],
        ),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: Any, texts: list[str]) -> None:
    write_sharded(tmp_path, weight_map, a=ONE, b=TWO)
    if not texts:  # b.safetensors is not named, so it is no part of the checkpoint
        assert list(CheckpointReader(tmp_path).tensors) == ["x"]
        return
    message = problems_of(tmp_path)
    for text in texts:
        assert text in message


def test_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x": "a.safetensors"}, a={**ONE, **TWO})
    assert "y is not in model.safetensors.index.json" in problems_of(tmp_path)


def test_tensor_in_two_files(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=ONE, b={**TWO, **ONE})
    assert "b.safetensors: x: also in a.safetensors" in problems_of(tmp_path)


def test_bad_index_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: not valid JSON" in problems_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").mkdir()
    assert "cannot be read: Is a directory" in problems_of(tmp_path)


def test_single_file_and_index_together(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x": "a.safetensors"}, a=ONE, model=ONE)
    message = problems_of(tmp_path)
    assert "both model.safetensors and model.safetensors.index.json" in message
    assert "fix: remove the one that is stale" in message


def test_problems_of_all_files_at_once(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=ONE, b=TWO)
    (tmp_path / "a.safetensors").write_bytes(b"")
    write_raw(tmp_path / "b.safetensors", {"y": entry("F3", [1], 0, 1), "z": 5}, b"1")
    message = problems_of(tmp_path)
    for text in ("a.safetensors: 0 bytes", "b.safetensors: y: dtype 'F3'", "b.safetensors: z: its"):
        assert text in message
