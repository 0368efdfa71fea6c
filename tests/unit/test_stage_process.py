"""The process group of a stage is ended as a whole: asked first, then killed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from pipeline import stage_process
from pipeline.stage_process import _ended_as_a_group
from tests.processes import ends_soon


def _start(script: str, root: Path) -> subprocess.Popen[str]:
    """A leader of a group, which has a member that runs `script`; both sleep."""
    inner = f"echo $BASHPID > pid; {script}; echo > ready; sleep 600 & wait"
    child = subprocess.Popen(
        ["bash", "-c", f"( {inner} ) & wait"], cwd=root, start_new_session=True, text=True
    )
    while not (root / "ready").exists():
        assert child.poll() is None
        time.sleep(0.01)
    return child


def _interrupt(child: subprocess.Popen[str]) -> None:
    with pytest.raises(KeyboardInterrupt), _ended_as_a_group(child):
        raise KeyboardInterrupt


def test_a_member_may_pass_the_end_on(tmp_path: Path) -> None:
    child = _start("trap 'echo > told; exit' TERM", tmp_path)
    _interrupt(child)
    assert (tmp_path / "told").exists()
    assert child.returncode is not None
    assert ends_soon(int((tmp_path / "pid").read_text()))


def test_a_member_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "_END_S", 0.5)
    child = _start("trap '' TERM", tmp_path)
    started = time.monotonic()
    _interrupt(child)
    assert time.monotonic() - started >= 0.5
    assert ends_soon(int((tmp_path / "pid").read_text()))


def test_nothing_is_waited_for_where_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_process, "_END_S", 60)
    child = subprocess.Popen(["true"], start_new_session=True, text=True)
    started = time.monotonic()
    with _ended_as_a_group(child):
        child.wait()
    assert time.monotonic() - started < 10
