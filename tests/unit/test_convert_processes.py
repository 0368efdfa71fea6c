"""Stages in processes of their own: the same bytes, every problem, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.build_config import LaunchMode
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.convert_processes import convert_in_processes
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.writer import check_room
from pipeline.errors import CheckpointError, PlanError, StageError
from pipeline.launch import processes_that_fit
from pipeline.memory import _cgroups_free, free_memory_bytes
from pipeline.progress import SilentProgress
from tests.foreign_checkpoints import write_foreign
from tests.tiny import write_tiny_llama


class CountingProgress(SilentProgress):
    total = done = 0

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def start(self, total: int, unit: str) -> None:
        self.total, self.done = total, 0

    def advance(self, note: str = "") -> None:
        self.done += 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: stages of two, two and one."""
    return write_tiny_llama(tmp_path_factory.mktemp("source"), num_hidden_layers=5)


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For three stages, whatever this machine has: one process has two of them."""
    monkeypatch.setattr(
        "pipeline.checkpoint.convert_processes.processes_that_fit", lambda *_, **__: 2
    )


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.mark.parametrize(
    "launch", ["sequential", pytest.param("mpirun", marks=pytest.mark.mpi)], ids=str
)
def test_same_bytes_as_one_process(
    source: Path, tmp_path: Path, two_processes: None, launch: LaunchMode
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    convert_checkpoint(source, one, tp=2, pp=3, progress=SilentProgress())
    progress = CountingProgress()
    convert_in_processes(source, many, tp=2, pp=3, launch=launch, progress=progress)
    assert digests(many) == digests(one)  # nothing else is left there either
    assert len(digests(many)) == 7
    # 7 tensors a layer in TensorRT-LLM's layout; embedding, last norm, lm_head
    assert progress.done == progress.total == 7 * 5 + 3


@pytest.mark.parametrize(
    "launch", ["sequential", pytest.param("mpirun", marks=pytest.mark.mpi)], ids=str
)
def test_ranks_of_one_stage_in_several_processes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: LaunchMode
) -> None:
    """tp 8 on two KV heads: ranks of different processes hold the same head."""
    monkeypatch.setattr(
        "pipeline.checkpoint.convert_processes.processes_that_fit", lambda *_, **__: 3
    )
    eight = write_tiny_llama(
        tmp_path / "source", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
    )
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    convert_checkpoint(eight, one, tp=8, pp=1, progress=SilentProgress())
    progress = CountingProgress()
    convert_in_processes(eight, many, tp=8, pp=1, launch=launch, progress=progress)
    assert digests(many) == digests(one)
    assert len(digests(many)) == 9
    assert progress.done == progress.total == 3 * (7 * 2 + 3)


def spoilt(source: Path, directory: Path, **changes: Callable[[np.ndarray], None]) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    for name, change in changes.items():
        change(tensors[name])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_bad_values_of_all_stages_are_listed(
    source: Path, tmp_path: Path, two_processes: None
) -> None:
    def spoil(values: np.ndarray) -> None:
        values.reshape(-1)[3] = np.nan

    first, last = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
    bad = spoilt(source, tmp_path / "bad", **{first: spoil, last: spoil})
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_in_processes(
            bad, out_dir, tp=1, pp=3, launch="sequential", progress=SilentProgress()
        )
    assert {problem.where for problem in caught.value.problems} == {first, last}
    assert {problem.what for problem in caught.value.problems} == {"1 values are NaN or Inf"}
    assert not (out_dir / "config.json").exists()
    assert not list(out_dir.glob(".convert-*"))


def test_headers_are_checked_before_a_process_starts(
    source: Path, tmp_path: Path, two_processes: None
) -> None:
    with pytest.raises(PlanError, match=r"tp=3: .* cannot be shared out evenly"):
        convert_in_processes(
            source, tmp_path, tp=3, pp=2, launch="sequential", progress=SilentProgress()
        )
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_is_named(source: Path, tmp_path: Path, two_processes: None) -> None:
    """Ranks 2 and 3 are those of the second stage, which the second process converts first."""
    (tmp_path / "rank3.safetensors").write_text("precious")
    with pytest.raises(StageError, match=r"ranks 2-3: ended with code 1; (.*\n)+.*FileExistsError"):
        convert_in_processes(
            source, tmp_path, tp=2, pp=3, launch="sequential", progress=SilentProgress()
        )
    assert (tmp_path / "rank3.safetensors").read_text() == "precious"
    assert not list(tmp_path.glob(".convert-*"))


def with_sitecustomize(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that are started from now on run the sitecustomize.py of a directory first."""
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


def test_a_process_that_is_killed_is_named_and_ends_the_others(
    source: Path, tmp_path: Path, two_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "job = sys.orig_argv[-1]\n"
        "if '\"ranks\": [2, 3]' in job:\n"
        "    os.kill(os.getpid(), 9)\n"
        "if '\"ranks\": [0, 1]' in job:\n"
        "    time.sleep(1000)\n"
    )
    with_sitecustomize(tmp_path, monkeypatch)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    text = r"ranks 2-3: was killed by signal 9; .*; fix: usually the kernel ran out of memory"
    with pytest.raises(StageError, match=text):
        convert_in_processes(
            source, out_dir, tp=4, pp=1, launch="sequential", progress=SilentProgress()
        )
    assert not (out_dir / "config.json").exists()
    assert not list(out_dir.glob(".convert-*"))


@pytest.mark.parametrize(
    "launch", ["sequential", pytest.param("mpirun", marks=pytest.mark.mpi)], ids=str
)
def test_what_stops_one_process_is_told_with_its_ranks(
    tiny_llama: Path,
    tmp_path: Path,
    two_processes: None,
    monkeypatch: pytest.MonkeyPatch,
    launch: LaunchMode,
) -> None:
    """A weight that the second stage alone reads, in a file that ends before it: a copy, for the
    process of the first stage may open the file at any time."""
    source, out_dir = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(tiny_llama, source)
    broken = "def row_blocks(self, name, *rest, **more):"
    (tmp_path / "sitecustomize.py").write_text(
        "import dataclasses, pathlib\n"
        "from pipeline.checkpoint import reader\n"
        "whole = reader.CheckpointReader.row_blocks\n"
        f"{broken}\n"
        "    if name == 'model.norm.weight':\n"
        "        info = self.tensors[name]\n"
        "        cut = pathlib.Path(f'{info.file}.cut')\n"
        "        cut.write_bytes(pathlib.Path(info.file).read_bytes()[:info.offset])\n"
        "        self.tensors[name] = dataclasses.replace(info, file=cut)\n"
        "    return whole(self, name, *rest, **more)\n"
        "reader.CheckpointReader.row_blocks = row_blocks\n"
    )
    with_sitecustomize(tmp_path, monkeypatch)
    out_dir.mkdir()
    with pytest.raises(CheckpointError, match=r"rank 1: .*the file ends inside the tensor"):
        convert_in_processes(source, out_dir, tp=1, pp=2, launch=launch, progress=SilentProgress())
    assert not (out_dir / "config.json").exists()


def test_a_process_that_nobody_waits_for_ends(
    source: Path, tmp_path: Path, two_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the run is killed: the process finds another parent than the one it was told."""
    monkeypatch.setattr("os.getpid", lambda: 2**30)
    with pytest.raises(StageError, match="ended with code 1"):
        convert_in_processes(
            source, tmp_path, tp=1, pp=2, launch="sequential", progress=SilentProgress()
        )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageError, match=rf"{tmp_path}: needs {2**60} bytes, \d+ are free on the"):
        check_room(tmp_path, 2**60)
    monkeypatch.setattr("pipeline.checkpoint.convert.planned_sizes", lambda *_: [2**58] * 4)
    with pytest.raises(StageError, match=rf"needs {2**60} bytes"):
        convert_checkpoint(source, tmp_path, tp=2, pp=2, progress=SilentProgress())
    assert not list(tmp_path.iterdir())


def test_layers_are_read_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files sort names as text: 0, 1, 10, 11, 2, ..."""
    source = write_tiny_llama(tmp_path / "source", num_hidden_layers=12, hidden_size=64)
    layers: list[str] = []
    blocks = CheckpointReader.row_blocks

    def recording(self: CheckpointReader, name: str, *rest: object, **more: object) -> object:
        layer = name.split(".")[2] if ".layers." in name else name
        if layers[-1:] != [layer]:
            layers.append(layer)
        return blocks(self, name, *rest, **more)

    monkeypatch.setattr(CheckpointReader, "row_blocks", recording)
    (tmp_path / "out").mkdir()
    convert_checkpoint(source, tmp_path / "out", tp=1, pp=1, progress=SilentProgress())
    in_file = [name for name in CheckpointReader(source).tensors if ".layers." in name]
    assert [layer for layer in layers if layer.isdigit()] == list(
        dict.fromkeys(name.split(".")[2] for name in in_file)
    )


def test_processes_that_fit() -> None:
    assert processes_that_fit(2**60, at_most=8) == 1
    assert processes_that_fit(1, at_most=1) == 1
    assert processes_that_fit(1, at_most=10**6) == len(os.sched_getaffinity(0))


def test_the_least_limit_of_enclosing_groups_counts(tmp_path: Path) -> None:
    def group(path: str, limit: str, current: int, cached: int) -> None:
        directory = tmp_path / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nslab 3\n")

    group("a/b", "max", 0, 0)
    group("a", "1000", 900, 300)
    assert list(_cgroups_free(tmp_path, "a/b")) == [400]
    group("a/b", "500", 600, 10)
    assert list(_cgroups_free(tmp_path, "a/b")) == [0, 400]
    assert list(_cgroups_free(tmp_path, "")) == []


def test_free_memory_is_that_of_the_machine_at_most() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory_bytes() <= total


def test_options_reach_every_process(tmp_path: Path, two_processes: None) -> None:
    """Padding, requantizing and NaN: as in one process."""
    plain = write_tiny_llama(
        tmp_path / "plain",
        hidden_size=256,
        intermediate_size=320,
        num_key_value_heads=4,
        num_hidden_layers=3,
    )
    write_foreign(plain, tmp_path / "hf", method="awq")
    spoilt(tmp_path / "hf", tmp_path / "bad", **{"model.norm.weight": _set_nan})
    options = ConvertOptions(pad_ffn=True, requantize_asymmetric=True, allow_not_finite=True)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    convert_checkpoint(
        tmp_path / "bad", tmp_path / "one", tp=4, pp=3, progress=SilentProgress(), options=options
    )
    progress = CountingProgress()
    convert_in_processes(
        tmp_path / "bad",
        tmp_path / "many",
        tp=4,
        pp=3,
        launch="sequential",
        progress=progress,
        options=options,
    )
    assert progress.lines == [
        "model.norm.weight: 1 values are NaN or Inf; convert.allow_not_finite keeps them"
    ]
    assert digests(tmp_path / "many") == digests(tmp_path / "one")
    assert len(digests(tmp_path / "many")) == 13


def _set_nan(values: np.ndarray) -> None:
    values[0] = np.nan
