"""Ranks with a process of their own under the real mpirun (Open MPI or MPICH): kills, memory, hosts."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from pipeline.errors import GateError, StageError
from pipeline.launch import ProgressFiles, RankJob, RanksView, find_mpirun, run_ranks
from pipeline.progress import SilentProgress

pytestmark = pytest.mark.mpi

SLEEPS = "import time\ntime.sleep(300)\n"
ALIVE = "import os, pathlib, sys\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules ranks can run."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    )
    (tmp_path / "sleeps.py").write_text(ALIVE + SLEEPS)
    (tmp_path / "writes.py").write_text(ALIVE)
    return tmp_path


def _jobs(directory: Path, *names: str, size: int = 0) -> list[RankJob]:
    return [
        RankJob(
            rank,
            name,
            argument=str(directory / f"out{rank}"),
            log_path=str(directory / f"rank{rank}.log"),
            error_path=str(directory / f"rank{rank}.error.json"),
            own_process=True,
            memory_bytes=size,
            progress_path=str(directory / f"{rank}.progress"),
        )
        for rank, name in enumerate(names)
    ]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def _all_end(directory: Path) -> bool:
    """Whether every worker that said its process id ends within seconds."""
    pids = [int(path.read_text()) for path in directory.glob("out*") if path.read_text()]
    assert pids
    deadline = time.monotonic() + 10
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_is_alive, pids))


WAIT_FOR_ALL = (
    "import pathlib, sys, time\n"
    "own = pathlib.Path(sys.argv[1])\n"
    "while len(list(own.parent.glob('out*'))) < 3: time.sleep(0.02)\n"
)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os.kill(os.getpid(), 9)", r"^rank 1: was killed by signal 9; .*fix: usually the kernel ran "
         r"out of memory: .*build\.max_memory_gb"),
        ("os.kill(os.getppid(), 9)", r"^rank 1: was killed by signal 9; "),
        ("raise ValueError('no such tensor')", r"^rank 1: ended with code 1; .*no such tensor"),
    ],
)  # fmt: skip
def test_the_rank_that_ended_is_named_and_the_rest_stop(modules: Path, how: str, said: str) -> None:
    (modules / "ends.py").write_text(f"import os\n{ALIVE}{WAIT_FOR_ALL}{how}\n{SLEEPS}")
    started = time.monotonic()
    with pytest.raises(StageError) as caught:
        run_ranks(_jobs(modules, "sleeps", "ends", "sleeps"), "mpirun", modules / "jobs.json")
    assert re.search(said, str(caught.value).replace("\n", " ")), caught.value
    assert _all_end(modules)
    assert time.monotonic() - started < 60
    left = {path.name for path in modules.iterdir() if path.name.startswith("jobs")}
    assert left == set()


def test_an_own_error_keeps_its_kind(modules: Path) -> None:
    (modules / "gate.py").write_text(
        "import json, sys\n"
        "from pipeline.errors import GateError, Problem, error_to_json\n"
        "error = GateError(Problem('weight 3', 'differs', 'equal bytes', 'build again'))\n"
        "path = sys.argv[1].replace('out1', 'rank1.error.json')\n"
        "open(path, 'w').write(json.dumps(error_to_json(error)))\n"
        "sys.exit(6)\n"
    )
    with pytest.raises(GateError, match=r"^rank 1: weight 3: differs; allowed: equal bytes"):
        run_ranks(_jobs(modules, "sleeps", "gate"), "mpirun", modules / "jobs.json")
    assert _all_end(modules)


def test_mpirun_itself_is_killed(modules: Path) -> None:
    kill = (
        "import os, pathlib, signal\n"
        "def parent(pid): return int(pathlib.Path(f'/proc/{pid}/stat').read_text().split()[3])\n"
        f"pid = os.getpid()\nwhile parent(pid) != {os.getpid()}: pid = parent(pid)\n"
        "os.kill(pid, signal.SIGKILL)\n"
    )
    (modules / "kills.py").write_text(ALIVE + WAIT_FOR_ALL + kill + SLEEPS)
    with pytest.raises(
        StageError, match=r"^mpirun: was killed by signal 9; unfinished ranks: 0, 1, 2"
    ):
        run_ranks(_jobs(modules, "sleeps", "sleeps", "kills"), "mpirun", modules / "jobs.json")
    assert _all_end(modules)


def test_ranks_wait_for_memory(modules: Path) -> None:
    """Each takes 1000 bytes: never more than two of them fit."""
    (modules / "counts.py").write_text(
        "import os, pathlib, sys, time\n"
        "own = pathlib.Path(sys.argv[1])\n"
        "own.with_suffix('.running').touch()\n"
        "time.sleep(0.4)\n"
        "own.write_text(str(len(list(own.parent.glob('out*.running')))))\n"
        "own.with_suffix('.running').unlink()\n"
    )
    done: list[int] = []
    jobs = _jobs(modules, *["counts"] * 4, size=1000)
    run_ranks(jobs, "mpirun", modules / "jobs.json", done.append, max_memory_bytes=2999)
    assert sorted(done) == [0, 1, 2, 3]
    counts = [int((modules / f"out{rank}").read_text()) for rank in range(4)]
    assert max(counts) <= 2


def test_a_rank_that_alone_is_too_large_runs_and_says_so(modules: Path) -> None:
    class Said(SilentProgress):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, text: str) -> None:
            self.said.append(text)

    progress, jobs = Said(), _jobs(modules, "writes", "writes", size=3_000_000_000)
    view = RanksView([job.where for job in jobs], progress)
    files = ProgressFiles([Path(job.progress_path) for job in jobs], view.on_event)
    run_ranks(jobs, "mpirun", modules / "jobs.json", max_memory_bytes=2_000_000_000)
    files.finish()
    expected = "may take 3 GB of memory, more than the 2 GB that ranks have; it runs alone"
    assert sorted(progress.said) == [f"rank {rank}: {expected}" for rank in range(2)]
    progress.said.clear()
    run_ranks(
        jobs,
        "sequential",
        modules / "jobs.json",
        max_memory_bytes=2_000_000_000,
        on_note=progress.say,
    )
    assert progress.said == [f"rank {rank}: {expected}" for rank in range(2)]


def _hostfile(directory: Path, slots: int) -> Path:
    path = directory / "hosts"
    is_open_mpi = find_mpirun().kind == "open mpi"
    path.write_text(f"localhost slots={slots}\n" if is_open_mpi else f"localhost:{slots}\n")
    return path


def test_a_hostfile_is_used(modules: Path) -> None:
    jobs = _jobs(modules, *["writes"] * 4)
    run_ranks(jobs, "mpirun", modules / "jobs.json", hostfile=_hostfile(modules, 4))
    assert all((modules / f"out{rank}").exists() for rank in range(4))


def test_too_few_slots(modules: Path) -> None:
    if find_mpirun().kind == "mpich":
        pytest.skip("MPICH starts more ranks than slots without a word")
    hosts = _hostfile(modules, 2)
    with pytest.raises(StageError) as caught:
        run_ranks(_jobs(modules, *["writes"] * 4), "mpirun", modules / "jobs.json", hostfile=hosts)
    assert str(caught.value) == (
        f"{hosts}: has too few slots for 4 ranks; fix: raise slots= there (ranks wait for each other "
        "if memory is short), or use fewer ranks"
    )


def test_a_rank_that_does_not_find_its_input_says_so(modules: Path) -> None:
    jobs = [
        RankJob(
            0,
            "writes",
            argument=str(modules / "out0"),
            log_path=str(modules / "rank0.log"),
            error_path=str(modules / "rank0.error.json"),
            own_process=True,
            inputs=(str(modules), "/nowhere/convert/12ab"),
        )
    ]
    with pytest.raises(
        StageError,
        match=r"^rank 0 on \S+: /nowhere/convert/12ab is not there; fix: the store must be shared",
    ):
        run_ranks(jobs, "mpirun", modules / "jobs.json")
