"""Ranks in turn and under the real mpirun; a failing rank is named and ends all."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import GateError, StageError, ToolError
from pipeline.launch import RankJob, find_mpirun, run_at_once, run_ranks
from tests.processes import ends_soon


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with small modules that ranks can run."""
    (tmp_path / "writes.py").write_text(
        "import sys, pathlib\nprint('hello')\npathlib.Path(sys.argv[1]).write_text('x')\n"
    )
    (tmp_path / "fails.py").write_text("raise ValueError('no such tensor')\n")
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    (tmp_path / "waits.py").write_text(
        "from mpi4py import MPI\nMPI.COMM_WORLD.Barrier()\n"  # a rank that needs the others
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def _jobs(directory: Path, *modules: str) -> list[RankJob]:
    return [
        RankJob(
            rank,
            module,
            argument=str(directory / f"out{rank}"),
            log_path=str(directory / f"rank{rank}.log"),
            error_path=str(directory / f"rank{rank}.error.json"),
        )
        for rank, module in enumerate(modules)
    ]


def test_sequential_runs_all(workers: Path) -> None:
    run_ranks(_jobs(workers, "writes", "writes"), "sequential", workers / "jobs.json")
    assert (workers / "out0").exists()
    assert (workers / "out1").exists()
    assert "hello" in (workers / "rank1.log").read_text()


def test_sequential_names_the_failing_rank(workers: Path) -> None:
    with pytest.raises(StageError, match=r"rank 1: ended with code 1; .*\n[^$]*no such tensor"):
        run_ranks(_jobs(workers, "writes", "fails"), "sequential", workers / "jobs.json")


def test_a_rank_s_own_error_keeps_its_kind_and_fix(workers: Path) -> None:
    (workers / "gate.py").write_text(
        "import json, sys\n"
        "from pipeline.errors import GateError, Problem, error_to_json\n"
        "error = GateError(Problem('weight 3', 'differs', 'equal bytes', 'build again'))\n"
        "open(sys.argv[1].replace('out1', 'rank1.error.json'), 'w').write("
        "json.dumps(error_to_json(error)))\n"
        "sys.exit(6)\n"
    )
    with pytest.raises(GateError) as caught:
        run_ranks(_jobs(workers, "writes", "gate"), "sequential", workers / "jobs.json")
    expected = "rank 1: weight 3: differs; allowed: equal bytes; fix: build again"
    assert str(caught.value) == expected


def test_a_kill_is_called_a_kill(workers: Path) -> None:
    with pytest.raises(
        StageError, match=r"rank 0: was killed by signal 9; .*usually the kernel ran out of memory"
    ):
        run_ranks(_jobs(workers, "killed"), "sequential", workers / "jobs.json")


@pytest.mark.parametrize(
    "how", ["run_ranks(jobs, 'sequential', root / 'jobs.json')", "run_at_once(jobs)"]
)
def test_ranks_end_with_the_one_that_waits_for_them(workers: Path, how: str) -> None:
    """Also one that knows nothing of us, or is still starting: its own module does not ask for it."""
    (workers / "sleeps.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    starter = (
        "import pathlib\nfrom pipeline.launch import RankJob, run_at_once, run_ranks\n"
        f"root = pathlib.Path({str(workers)!r})\n"
        "jobs = [RankJob(0, 'sleeps', str(root / 'pid'), str(root / 'log'), str(root / 'error'))]\n"
    )
    process = subprocess.Popen([sys.executable, "-c", starter + how])
    pid_path = workers / "pid"
    while not (pid_path.exists() and pid_path.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert ends_soon(int(pid_path.read_text()))


def test_at_once_runs_all(workers: Path) -> None:
    """Each waits for the other: in turn they would never end."""
    (workers / "meets.py").write_text(
        "import pathlib, sys, time\n"
        "own = pathlib.Path(sys.argv[1])\n"
        "other = own.with_name({'out0': 'out1', 'out1': 'out0'}[own.name])\n"
        "own.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
    )
    run_at_once(_jobs(workers, "meets", "meets"))


def test_at_once_a_failing_rank_ends_the_others(workers: Path) -> None:
    (workers / "sleeps.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(StageError, match="rank 1: was killed by signal 9"):
        run_at_once(_jobs(workers, "sleeps", "killed"))


@pytest.mark.mpi
def test_mpirun_runs_all(workers: Path) -> None:
    run_ranks(
        _jobs(workers, "writes", "writes", "writes", "writes"), "mpirun", workers / "jobs.json"
    )
    assert all((workers / f"out{rank}").exists() for rank in range(4))
    assert "hello" in (workers / "rank3.log").read_text()
    assert not (workers / "jobs.json").exists()
    assert not list(workers.glob("*.done")), "markers are removed"


@pytest.mark.mpi
@pytest.mark.parametrize("bad", ["fails", "killed"])
def test_mpirun_a_failing_rank_ends_the_waiting_ones(workers: Path, bad: str) -> None:
    with pytest.raises(StageError) as caught:
        run_ranks(_jobs(workers, "waits", bad, "waits"), "mpirun", workers / "jobs.json")
    assert "1" in str(caught.value)
    if bad == "fails":
        assert "rank 1: ended with code" in str(caught.value)
        assert "no such tensor" in str(caught.value)


def test_no_mpirun_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ToolError, match=r"mpirun is not installed; fix: pip install 'trtpipe\[mpi\]'"
    ):
        find_mpirun()
