"""`trtpipe run` of four ranks under the real mpirun, killed where nobody is left to tidy up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from tests.build_config import write_build

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

WORLD_SIZE = 4
_ONE_AFTER_THE_OTHER_GB = 0.001


def _start(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(config), "--json"],
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _alive_in(root: Path) -> dict[int, str]:
    """Process id -> command line of every process that works in or below a directory, but zombies."""
    found = {int(path.name): _command(path, root) for path in Path("/proc").glob("[0-9]*")}
    return {pid: command for pid, command in found.items() if command}


def _command(process: Path, root: Path) -> str:
    try:
        is_ours = (process / "cwd").readlink().is_relative_to(root)
        return (
            (process / "cmdline").read_text(errors="replace").replace("\0", " ") if is_ours else ""
        )
    except OSError:  # it has ended
        return ""


def _mpirun_of(process: subprocess.Popen[str], root: Path) -> int:
    """mpirun, by whatever name its program runs: it has no module of ours but its ranks'."""
    for pid, command in _alive_in(root).items():
        program = Path(command.split()[0]).name
        if program in ("mpirun", "prterun", "prte", "mpiexec", "mpiexec.hydra"):
            return pid
    raise AssertionError(f"no mpirun in {_alive_in(root)}")


def _wait(until: Callable[[], bool], what: str, root: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"{what}: {_alive_in(root)}"
        time.sleep(0.02)


def _finished(root: Path) -> list[str]:
    """Ranks that a killed build has left complete."""
    found = (root / "engines" / ".store" / "unfinished").glob("build-*/rank?/parts.json")
    return sorted(path.parent.name for path in found)


@pytest.mark.parametrize("victim", ["the run", "mpirun"])
def test_nothing_is_left_behind_and_the_next_run_continues(tmp_path: Path, victim: str) -> None:
    config = write_build(
        tmp_path,
        mapping={"tp": 2, "pp": 2},
        build={"launch": "mpirun", "max_memory_gb": _ONE_AFTER_THE_OTHER_GB},
    )
    process = _start(config)

    def is_halfway() -> bool:
        return bool(_finished(tmp_path)) or process.poll() is not None

    _wait(is_halfway, "no rank was finished", tmp_path)
    killed = process.pid if victim == "the run" else _mpirun_of(process, tmp_path)
    os.kill(killed, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    _wait(lambda: not _alive_in(tmp_path), "still alive", tmp_path, 30)
    if victim == "mpirun":
        assert process.returncode == ExitCode.STAGE, errors
        assert "mpirun: was killed by signal 9; unfinished ranks: " in errors
    else:
        assert process.returncode == -signal.SIGKILL
    finished = _finished(tmp_path)
    assert 0 < len(finished) < WORLD_SIZE, errors
    visible = {path.name for path in (tmp_path / "engines").iterdir()}
    assert visible == {".store"}

    again = _start(config)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert f"{len(finished)} of 4 ranks are finished; continuing" in errors
    assert json.loads(output)["executed"] == ["build", "verify"]
    published = {path.name for path in (tmp_path / "engines" / "tiny").iterdir()}
    assert {f"rank{rank}.onnx" for rank in range(WORLD_SIZE)} <= published
    assert not _alive_in(tmp_path)
