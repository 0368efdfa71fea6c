"""Any split into files reads back; any corruption is a typed error and never a read outside the file."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save, save_file

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float16", "float32", "int8", "uint8", "int64"])
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn, min_size: int = 1) -> dict[str, np.ndarray]:
    specs = draw(st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=min_size, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return {
        name: np.frombuffer(
            random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype
        ).reshape(shape)
        for name, (shape, dtype) in specs.items()
    }


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(tensors(), st.data(), st.integers(1, 40))
@settings(deadline=None)
def test_any_split_into_files(
    values: dict[str, np.ndarray], data: st.DataObject, block_bytes: int
) -> None:
    weight_map = {name: f"{data.draw(st.integers(1, 3))}.safetensors" for name in values}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for file in set(weight_map.values()):
            part = {key: values[key] for key in values if weight_map[key] == file}
            save_file(part, directory / file)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        reader = CheckpointReader(directory)
        assert reader.tensors.keys() == values.keys()
        for key, wanted in values.items():
            assert same(reader.read(key), wanted)
            if wanted.ndim and len(wanted):
                blocks = [rows for _, rows in reader.row_blocks(key, block_bytes)]
                assert same(np.concatenate(blocks), wanted)


def read_all(data: bytes) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(data)
        reader = CheckpointReader(path)
        return {name: reader.read(name) for name in reader.tensors}


def check_against_library(data: bytes) -> None:
    """Our reader fails with a typed error, or agrees with the safetensors library to the byte."""
    try:
        ours = read_all(data)
    except CheckpointError:
        return
    theirs = load(data)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes(data: bytes) -> None:
    check_against_library(data)


@given(tensors(), st.data())
@settings(max_examples=700, deadline=None)
def test_one_byte_of_the_header_changed(values: dict[str, np.ndarray], data: st.DataObject) -> None:
    good = save(values)
    (length,) = struct.unpack("<Q", good[:8])
    position = data.draw(st.integers(0, 8 + length - 1))
    value = data.draw(st.integers(0, 255))
    check_against_library(good[:position] + bytes([value]) + good[position + 1 :])


@given(tensors(), st.data())
@settings(max_examples=200, deadline=None)
def test_cut_anywhere(values: dict[str, np.ndarray], data: st.DataObject) -> None:
    good = save(values)
    end = data.draw(st.integers(0, len(good) - 1))
    try:
        read_all(good[:end])
    except CheckpointError:
        return
    raise AssertionError("a truncated file was accepted")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=2) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | JSON,
    }
)


@given(
    st.dictionaries(NAMES | st.just("__metadata__"), ENTRIES | JSON, max_size=3),
    st.binary(max_size=32),
)
@settings(max_examples=800, deadline=None)
def test_any_header(header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    check_against_library(struct.pack("<Q", len(text)) + text + body)


@given(
    st.dictionaries(NAMES, JSON | st.sampled_from(["a.safetensors", "b.safetensors"]), max_size=3)
    | JSON
)
@settings(max_examples=300, deadline=None)
def test_any_index(weight_map: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_file({"x": np.zeros(1)}, directory / "a.safetensors")
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        try:
            reader = CheckpointReader(directory)
        except CheckpointError:
            return
        assert set(reader.tensors) == {"x"} == set(weight_map)
