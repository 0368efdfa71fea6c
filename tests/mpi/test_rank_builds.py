"""Builds of four ranks under the real mpirun: killed, out of disk, and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.config import LoadedConfig, load_config
from pipeline.engine.rank_dirs import finished_ranks
from pipeline.errors import StageError
from pipeline.progress import SilentProgress
from pipeline.stage_process import run_stage
from pipeline.stages import STAGES
from tests.build_config import write_build

pytestmark = pytest.mark.mpi

WORLD_SIZE = 4


class Told(SilentProgress):
    """Remembers what it was told; may be asked to act on it."""

    def __init__(self, act: Callable[[str], None] = lambda text: None) -> None:
        self.said: list[str] = []
        self.done: list[str] = []
        self._act = act

    def advance(self, note: str = "") -> None:
        self.done.append(note)
        self._act(note)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/, tiny.yaml and checkpoint/ of four ranks."""
    root = tmp_path_factory.mktemp("source")
    write_build(root, mapping={"tp": 2, "pp": 2}, build={"launch": "mpirun"})
    (root / "checkpoint").mkdir()
    convert_checkpoint(root / "weights", root / "checkpoint", tp=2, pp=2, progress=SilentProgress())
    return root


def _build(source: Path, root: Path, progress: Told, **build: object) -> Path:
    """The stage in a process of its own; returns what it made."""
    loaded = load_config(source / "tiny.yaml")
    changed = loaded.config.build.model_copy(update=build)
    loaded = _with_build(loaded, changed)
    out_dir = root / f"out{len(list(root.glob('out*')))}"
    out_dir.mkdir()
    ranks_dir = root / "unfinished"
    ranks_dir.mkdir(exist_ok=True)
    inputs = {"checkpoint": source / "checkpoint", "source": source / "weights"}
    run_stage("build", loaded, inputs, out_dir, progress, ranks_dir)
    return out_dir


def _with_build(loaded: LoadedConfig, build: object) -> LoadedConfig:
    return loaded.replaced(build=build)


def _workers(root: Path) -> list[int]:
    """Process ids of rank workers that write below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"pipeline.engine.worker" in command and str(root).encode() in command:
            found.append(int(process.name))
    return found


def _kill_a_worker(root: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for pid in _workers(root):
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.01)


def test_a_killed_rank_is_built_again_and_the_others_are_kept(source: Path, tmp_path: Path) -> None:
    ranks_dir = tmp_path / "unfinished"

    def act(note: str) -> None:
        if note == "rank 0 is finished":
            _kill_a_worker(tmp_path)

    with pytest.raises(StageError, match=r"^rank \d: was killed by signal 9; "):
        # One after the other, so that some rank is still to come when the first is finished.
        _build(source, tmp_path, Told(act), max_memory_gb=0.001)
    finished = finished_ranks(ranks_dir)
    assert 0 in finished
    assert len(finished) < WORLD_SIZE
    assert STAGES["build"].finished_parts(ranks_dir).startswith("ranks built: 0")
    assert (tmp_path / "out0" / "rank0.log").is_file()
    deadline = time.monotonic() + 10
    while _workers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _workers(tmp_path)
    kept = {rank: (ranks_dir / f"rank{rank}").stat().st_mtime_ns for rank in finished}
    told = Told()
    out_dir = _build(source, tmp_path, told)
    assert told.said[0] == f"{len(finished)} of 4 ranks are finished; continuing"
    assert sorted(told.done) == [f"rank {rank} is finished" for rank in range(WORLD_SIZE)]
    assert {rank: (ranks_dir / f"rank{rank}").stat().st_mtime_ns for rank in finished} == kept
    names = {path.name for path in out_dir.iterdir()}
    for rank in range(WORLD_SIZE):
        endings = (".onnx", ".trt.onnx", ".weights", ".facts.json", ".log")
        assert {f"rank{rank}{ending}" for ending in endings} <= names
    assert not [name for name in names if name.startswith((".ranks", "jobs", "parts"))]


def _contents(directory: Path) -> dict[str, bytes]:
    """Everything but logs and times."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".log" and not path.name.endswith(".facts.json")
    }


@pytest.mark.slow
def test_launching_changes_no_byte(source: Path, tmp_path: Path) -> None:
    for name in ("mpirun", "sequential"):
        (tmp_path / name).mkdir()
    in_turn = _build(source, tmp_path / "sequential", Told(), launch="sequential")
    at_once = _build(source, tmp_path / "mpirun", Told())
    assert _contents(in_turn) == _contents(at_once)
    assert len(_contents(in_turn)) > 3 * WORLD_SIZE


@pytest.mark.slow
def test_a_kill_in_turn_is_continued_too(source: Path, tmp_path: Path) -> None:
    def act(note: str) -> None:
        if note == "rank 1 is finished":
            _kill_a_worker(tmp_path)

    with pytest.raises(StageError, match=r"^rank 2: was killed by signal 9; "):
        _build(source, tmp_path, Told(act), launch="sequential")
    assert finished_ranks(tmp_path / "unfinished") == [0, 1]
    told = Told()
    _build(source, tmp_path, told, launch="mpirun")
    assert told.said[0] == "2 of 4 ranks are finished; continuing"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that two ranks fill (a rank of this model takes about 0.25 MB)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_named_and_what_is_finished_is_kept(source: Path, small_disk: Path) -> None:
    with pytest.raises(StageError, match=r"^rank 2: .*No space left on device"):
        _build(source, small_disk, Told(), launch="sequential")
    assert finished_ranks(small_disk / "unfinished") == [0, 1]
    left = [path.name for path in (small_disk / "unfinished").glob("rank2.open.*/*")]
    assert not [name for name in left if name.endswith((".weights", ".onnx"))]
