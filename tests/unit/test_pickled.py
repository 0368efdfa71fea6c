"""PyTorch's own files: same values as safetensors, nothing executed, every kind of bad file."""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.mapped_file import MappedFile
from pipeline.checkpoint.pickled import PickledReader, holds_pickles
from pipeline.checkpoint.source import open_checkpoint
from pipeline.cli import main
from pipeline.errors import CheckpointError
from pipeline.progress import SilentProgress


def as_pickles(source: Path, directory: Path, num_files: int = 1) -> Path:
    """The checkpoint saved by torch itself: one file, or several with an index."""
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if num_files == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return directory
    names = sorted(tensors)
    weight_map = {}
    for index in range(num_files):
        file = f"pytorch_model-{index + 1:05d}-of-{num_files:05d}.bin"
        held = names[index::num_files]
        torch.save({name: tensors[name] for name in held}, directory / file)
        weight_map |= dict.fromkeys(held, file)
    index_path = directory / "pytorch_model.bin.index.json"
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def problems_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        PickledReader(path)
    return str(caught.value)


@pytest.mark.parametrize("num_files", [1, 3])
def test_same_rank_files_as_from_safetensors(
    tiny_llama: Path, tmp_path: Path, num_files: int
) -> None:
    source = as_pickles(tiny_llama, tmp_path / "hf", num_files)
    for name, directory in (("a", tiny_llama), ("b", source)):
        (tmp_path / name).mkdir()
        convert_checkpoint(directory, tmp_path / name, tp=2, pp=1, progress=SilentProgress())
    for file in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_every_dtype_and_any_rows(tmp_path: Path) -> None:
    tensors = {
        str(dtype).removeprefix("torch."): torch.arange(24).reshape(6, 4).to(dtype)
        for dtype in (
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    tensors["transposed"] = torch.arange(24.0).reshape(4, 6).T
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    torch.save(tensors, tmp_path / "x.pth")
    reader = PickledReader(tmp_path / "x.pth")
    for name, tensor in tensors.items():
        values = reader.read(name)
        assert values.shape == tuple(tensor.shape), name
        wide = tensor.to(torch.float64).numpy()
        assert np.array_equal(values.astype(np.float64), wide), name
    assert np.array_equal(reader.read_rows("float16", 2, 5), tensors["float16"][2:5].numpy())
    assert reader.tensors["bfloat16"].dtype == "BF16"
    blocks = list(reader.row_blocks("float32", block_bytes=32))
    assert [start for start, _ in blocks] == [0, 2, 4]


def resident_bytes(kind: str) -> int:
    """Memory of this process: RssAnon, or RssFile with the pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith(kind)) << 10


def test_the_file_is_mapped_not_read(tmp_path: Path) -> None:
    torch.save({"big": torch.ones(1 << 13, 1 << 12, dtype=torch.float16)}, tmp_path / "big.bin")
    before, pages = resident_bytes("RssAnon"), resident_bytes("RssFile")
    reader = PickledReader(tmp_path / "big.bin")
    assert reader.tensors["big"].nbytes == 64 << 20
    assert sum(
        float(rows.sum(dtype=np.float64)) for _, rows in reader.row_blocks("big", 1 << 20)
    ) == (1 << 25)
    assert resident_bytes("RssAnon") - before < 16 << 20  # observed 0 to 3 MiB
    assert resident_bytes("RssFile") - pages < 16 << 20  # observed 1.4 MiB, without it 64
    assert (reader.read_rows("big", 5, 9) == 1).all()  # read again


def test_memory_that_is_no_part_of_the_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    ours = np.ones(1 << 20, np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        MappedFile(path).forget(ours.ctypes.data, ours.nbytes)
    assert ours.all()


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, (str(self._path),))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_is_never_executed(tiny_llama: Path, tmp_path: Path, how: str) -> None:
    source = as_pickles(tiny_llama, tmp_path / "hf")
    path, trace = source / "pytorch_model.bin", tmp_path / "executed"
    content = {"model.norm.weight": torch.zeros(2), "x": Malicious(trace)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert not trace.exists()
    if how == "torch":
        assert str(caught.value) == (
            f"{path}: the pickle wants to execute code (posix.mkdir); nothing of it was executed; "
            "allowed: tensors only; fix: take the model from a source that you trust, as safetensors"
        )
    # The proof that the file is what it claims: unpickling it without care does execute.
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()


def test_files_that_are_none(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.touch()
    assert problems_of(tmp_path) == (
        f"{path}: 0 bytes: an empty file; fix: copy or download it again"
    )
    path.write_bytes(b"hello")
    assert f"{path}: no zip archive: another kind of file" in problems_of(tmp_path)
    torch.save({"x": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 10):
        path.write_bytes(whole[:size])
        assert "not a PyTorch file, or truncated" in problems_of(tmp_path), size
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert "no zip archive: another kind of file, or one of PyTorch before 1.6" in problems_of(
        tmp_path
    )
    torch.save([torch.zeros(3)], path)
    assert "holds a list; allowed: a mapping of name to tensor" in problems_of(tmp_path)
    torch.save({"x": 3, "y": torch.zeros(2).to_sparse(), 4: torch.zeros(1)}, path)
    text = problems_of(tmp_path)
    assert f"{path}: x: is a int; allowed: a tensor" in text
    assert "torch.sparse_coo; allowed: dense" in text
    assert "4 is not a tensor name" in text


def saved_entries() -> dict[str, bytes]:
    """The archive that torch writes, entry by entry."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3).half()}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


ENTRIES = saved_entries()
PICKLE = ENTRIES["archive/data.pkl"]


def write_archive(path: Path, pickled: bytes) -> None:
    """What torch saved, with another pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (ENTRIES | {"archive/data.pkl": pickled}).items():
            archive.writestr(name, content)


def replaced(edits: list[tuple[int, int]]) -> bytes:
    """The saved pickle with some bytes replaced: place -> value."""
    content = bytearray(PICKLE)
    for place, value in edits:
        content[place] = value
    return bytes(content)


PLACES = st.integers(0, len(PICKLE) - 1)
OPCODES = st.sampled_from([ord(opcode.code) for opcode in pickletools.opcodes])
MUTATED = st.one_of(
    st.lists(st.tuples(PLACES, st.integers(0, 255) | OPCODES), min_size=1, max_size=4).map(
        replaced
    ),
    st.tuples(PLACES, PLACES).map(lambda cut: PICKLE[: cut[0]] + PICKLE[cut[1] :]),
    st.binary(max_size=24).map(lambda body: b"\x80\x02" + body + b"."),
    st.lists(OPCODES, max_size=8).map(lambda codes: b"\x80\x02" + bytes(codes) + b"."),
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(MUTATED)
@example(b"\x80\x02R.")  # IndexError in torch 2.12
@example(b"")
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_pickle_is_a_typed_error(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_archive(path, pickled)
    try:
        reader = PickledReader(tmp_path)
    except CheckpointError:  # anything else fails the test
        return
    assert all(info.file == path for info in reader.tensors.values())


def test_a_damaged_pickle_is_shown_as_one(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    write_archive(tmp_path / "pytorch_model.bin", PICKLE)
    assert PickledReader(tmp_path).read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    write_archive(tmp_path / "pytorch_model.bin", b"\x80\x02R.")
    assert main(["show", str(tmp_path)]) == 3
    message = capsys.readouterr().err.replace("\n", " ")
    assert "not a PyTorch file, or truncated (pop from empty list)" in message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("../secret.bin", "x is said to be in '../secret.bin'; allowed: a .bin file name without"),
        ("gone.bin", "x is said to be in gone.bin, which is missing"),
        ("model.safetensors", "allowed: a .bin file name without a path"),
    ],
)
def test_bad_index(tmp_path: Path, file: str, text: str) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path.parent / "secret.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": file}}))
    assert text in problems_of(tmp_path)


def test_index_that_contradicts_the_files(tiny_llama: Path, tmp_path: Path) -> None:
    source = as_pickles(tiny_llama, tmp_path / "hf", num_files=2)
    index = source / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.bias"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    assert "model.norm.bias is said to be in pytorch_model-00001-of-00002.bin, which lacks it" in (
        problems_of(source)
    )
    names = list(load_file(tiny_llama / "model.safetensors"))
    both = {name: torch.zeros(1) for name in names}
    torch.save(both, source / "pytorch_model-00002-of-00002.bin")
    assert "also in pytorch_model-00001-of-00002.bin: a tensor must be in one file only" in (
        problems_of(source)
    )


def test_safetensors_win(tiny_llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_llama, tmp_path / "hf")
    (directory / "pytorch_model.bin").write_bytes(b"whatever")
    assert not holds_pickles(directory)
    assert open_checkpoint(directory).reader.tensors
