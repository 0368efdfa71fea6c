"""Directories that cannot be written and full disks: named before a stage runs, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.disk import disk_error, write_problem
from tests.build_config import write_build

FIX = "make it writable, or run in another directory"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[bool]:
    """A file system of its own there; False where this user may not mount."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def _run(config: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The problems of a run that is refused before any stage."""
    assert main(["run", str(config), "--json"]) == 5
    captured = capsys.readouterr()
    assert "starts" not in captured.err
    document = json.loads(captured.out)
    assert document["error"] == "StageError"
    found: list[dict[str, str]] = document["problems"]
    return found


def test_files_in_place_of_both_directories(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_build(here)
    for name in ("engines", "triton_repo"):
        (here / name).touch()
    assert _run(config, capsys) == [
        {"where": str(here / name), "what": "Not a directory", "allowed": "", "fix": FIX}
        for name in ("engines", "triton_repo")
    ]


def test_links_that_lead_nowhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_build(here)
    (here / "triton_repo").symlink_to("nowhere")
    (problem,) = _run(config, capsys)
    assert problem["where"] == str(here / "triton_repo")
    assert problem["what"] == "No such file or directory"
    assert not (here / "engines").exists()


@pytest.mark.parametrize("name", ["engines", "engines/.store", "triton_repo"])
def test_read_only_directories(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    config = write_build(here)
    (here / "engines").mkdir()
    with mounted(here / name, "ro") as is_mounted:
        if not is_mounted:  # a link to what no user may write, root included
            (here / name).rmdir()
            (here / name).symlink_to("/proc/self")
        (problem,) = _run(config, capsys)
    assert problem["where"] == str(here / name)
    assert problem["fix"] == FIX
    if is_mounted:
        assert problem["what"] == "Read-only file system"


def test_a_checkpoint_for_elsewhere_needs_no_repository(here: Path) -> None:
    config = write_build(here, build={"backend": "none"})
    (here / "triton_repo").touch()
    assert main(["run", str(config)]) == 0


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    assert write_problem(tmp_path) is None
    assert write_problem(tmp_path / "a" / "b") is None
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_seen_by_the_plan(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_build(here)
    with mounted(here / "engines", "size=4k") as is_mounted:
        if not is_mounted:
            return  # tests of plans know disks that no one has to mount
        assert main(["run", str(config), "--json"]) == 2
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert problem["where"] == f"disk of {here / 'engines'}"
        assert not list((here / "engines").iterdir())


@pytest.mark.parametrize("options", ["nr_inodes=5", "nr_inodes=12"])
def test_a_disk_that_is_full(here: Path, capsys: pytest.CaptureFixture[str], options: str) -> None:
    """In a write, which names no file, and where files are made, by the run or by its stage."""
    config = write_build(here)
    with mounted(here / "engines", options) as is_mounted:
        if not is_mounted:
            return  # `test_what_only_the_disk_can_cause` is all that this user can try
        assert main(["run", str(config), "--json"]) == 5
        captured = capsys.readouterr()
        assert not list((here / "engines" / ".store").glob("work/*"))
    (problem,) = json.loads(captured.out)["problems"]
    assert problem["what"] == "No space left on device"
    assert problem["fix"] == "free some space there, or run in another directory"
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x", "a/b"), "a/b: No space left on device; fix: free some space"),
        (OSError(errno.ENOSPC, "x"), "writing a file: No space left on device; fix: free some"),
        (OSError(errno.EDQUOT, "x", b"a"), "a: Disk quota exceeded; fix: free some space there"),
        (OSError(errno.EROFS, "x", "a"), f"a: Read-only file system; fix: {FIX}"),
        (OSError(errno.EACCES, "x", "a"), "a: Permission denied; fix: give this user access to"),
    ],
)
def test_what_only_the_disk_can_cause(error: OSError, text: str) -> None:
    assert str(disk_error(error)).startswith(text)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "x"), OSError(errno.ENOENT, "x", "a"), OSError("text"), OSError()],
)
def test_what_may_be_a_bug_stays_a_traceback(error: OSError) -> None:
    assert disk_error(error) is None
