"""Which mpirun it is, what it is told, and what its words mean: those of the real programs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError, PlanError, ToolError
from pipeline.launch import Mpirun, find_mpirun, hostfile_problem, started_too_often
from pipeline.launch.mpirun import Death, library_problem, refusal, reported_death, without_mpi
from pipeline.plan import make_plan
from pipeline.run import run
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder

OPEN_MPI_KILL = """\
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 22381 on node vm exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
MPICH_KILL = """\
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 22455 RUNNING AT vm
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
"""
NO_SLOTS = """\
There are not enough slots available in the system to satisfy the 4
slots that were requested by the application:
"""


def _fake(directory: Path, body: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "mpirun"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without an mpirun beside its interpreter; PATH has this directory alone."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "path"


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("mpirun (Open MPI) 5.0.11", "open mpi"),
        ("mpirun (Open MPI) 4.1.4", "open mpi"),
        ("HYDRA build details:\n    Version:                                 5.0.2", "mpich"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307", "mpich"),
    ],
)
def test_kinds_are_told_apart(elsewhere: Path, says: str, kind: str) -> None:
    path = _fake(elsewhere, f"echo '{says}'")
    assert find_mpirun() == Mpirun(path, kind, says.partition("\n")[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'SGI MPT 2.1'", r"mpirun --version says 'SGI MPT 2.1'; allowed: Open MPI or MPICH"),
        ("echo broken >&2; exit 3", r"mpirun --version says 'broken'"),
    ],
)
def test_another_mpirun_is_refused(elsewhere: Path, body: str, said: str) -> None:
    _fake(elsewhere, body)
    with pytest.raises(ToolError, match=said):
        find_mpirun()


def test_an_mpirun_that_cannot_start_is_refused(elsewhere: Path) -> None:
    _fake(elsewhere, "").write_text("#!/nowhere/sh\n")
    with pytest.raises(ToolError, match="mpirun cannot be started: No such file or directory"):
        find_mpirun()


OPEN_MPI = Mpirun(Path("/x/mpirun"), "open mpi", "")
MPICH = Mpirun(Path("/x/mpirun"), "mpich", "")


def test_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert OPEN_MPI.command(4) == [
        "/x/mpirun", "--allow-run-as-root", "--bind-to", "none", "--oversubscribe", "-n", "4",
    ]  # fmt: skip
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert OPEN_MPI.command(4) == [
        "/x/mpirun", "--bind-to", "none", "--oversubscribe", "-n", "4",
    ]  # fmt: skip
    assert MPICH.command(4) == ["/x/mpirun", "-n", "4"]


def test_on_the_hosts_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the file wins
    assert OPEN_MPI.command(4, Path("/y/hosts")) == [
        "/x/mpirun", "--bind-to", "none", "--hostfile", "/y/hosts", "-x", "OMP_WAIT_POLICY",
        "-n", "4",
    ]  # fmt: skip
    assert MPICH.command(4, Path("/y/hosts")) == ["/x/mpirun", "-f", "/y/hosts", "-n", "4"]


def test_in_a_slurm_allocation_its_slots_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/z")
    assert OPEN_MPI.command(4) == [
        "/x/mpirun", "--bind-to", "none", "-x", "PYTHONPATH", "-n", "4",
    ]  # fmt: skip
    assert MPICH.command(4) == ["/x/mpirun", "-n", "4"]
    problem = refusal(NO_SLOTS, 4, None)
    expected = (
        "Slurm allocation: has too few tasks for 4 ranks; fix: ask Slurm for more: --ntasks=4"
    )
    assert str(problem) == expected
    assert refusal("something else", 4, None) is None


def test_deaths_in_mpirun_s_words() -> None:
    assert reported_death(OPEN_MPI_KILL) == Death(1, None, -9)
    assert reported_death(MPICH_KILL) == Death(None, 22455, -9)
    mpich_exit = MPICH_KILL.replace("CODE: 9", "CODE: 3").partition("YOUR APPLICATION TERM")[0]
    assert reported_death(mpich_exit) == Death(None, 22455, 3)
    assert reported_death(NO_SLOTS) is None


def test_the_environment_of_an_mpi_process_is_not_handed_on() -> None:
    kept = {"PATH": "/bin", "OMPI_MCA_btl": "self", "PRTE_MCA_x": "1", "OMP_NUM_THREADS": "2"}
    of_a_rank = {
        "OMPI_COMM_WORLD_RANK": "0",
        "PMIX_RANK": "0",
        "PMI_SIZE": "4",
        "MPI_LOCALRANKID": "0",
    }
    assert without_mpi({**kept, **of_a_rank}) == kept


def test_libraries_of_another_mpi_are_named() -> None:
    assert library_problem("open mpi", "Open MPI") is None
    assert library_problem("mpich", "MPICH") is None
    assert library_problem("mpich", "Intel MPI") is None
    assert str(library_problem("mpich", "Open MPI")) == (
        "build.launch: mpirun: mpirun is MPICH's, and mpi4py uses Open MPI; fix: use both of one MPI: "
        "put its mpirun first on PATH, or install mpi4py for it"
    )


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("a slots=6\n# b\n", "open mpi", None),
        ("a:4\nb:4  # c\n", "mpich", None),
        ("a\nb\n", "mpich", None),
        ("a:4\n", "open mpi", "`a:4` is MPICH's way, and mpirun is Open MPI's; allowed: host slots=4"),
        ("a slots=4", "mpich", "`a slots=4` is Open MPI's way, and mpirun is MPICH's; allowed: host:4"),
        ("a slots=1\nb slots=3\nc slots=2 max_slots=4\n", "open mpi", None),
        ("a\nb slots=1\n", "open mpi", None),  # a has as many as it has cores
        (
            "a slots=2\nb slots=3\n",
            "open mpi",
            "has too few slots for 6 ranks; fix: raise slots= there (ranks wait for each other if "
            "memory is short), or use fewer ranks",
        ),
        ("a slots=two\n", "open mpi", "`a slots=two` has no number of slots; allowed: host slots=4"),
        ("a slots=0\n", "open mpi", "`a slots=0` has no number of slots; allowed: host slots=4"),
        ("# nothing\n\n", None, "names no host; allowed: a host name on each line"),
    ],
)  # fmt: skip
def test_hostfiles(tmp_path: Path, text: str, kind: str | None, said: str | None) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    problem = hostfile_problem(path, kind, 6)  # type: ignore[arg-type]
    assert (None if problem is None else str(problem)) == (said and f"{path}: {said}")


@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"PMI_SIZE": "4"}, "mpirun"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a batch script is started once
        ({}, None),
    ],
)
def test_one_command_started_several_times(
    environment: dict[str, str], starter: str | None
) -> None:
    problem = started_too_often(environment)
    assert (problem is None) == (starter is None)
    if problem is not None:
        assert str(problem).startswith(f"command line: {starter} has started this command 4 times")
        assert "start it once" in problem.fix


def test_a_run_that_mpirun_started_four_times_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_build(tmp_path)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(PlanError, match="mpirun has started this command 4 times"):
        run(load_config(config), Workspace(tmp_path), Recorder())
    assert not (tmp_path / "engines").exists()


def _plan_errors(config: Path, root: Path) -> list[str]:
    loaded = load_config(config)
    plan = make_plan(loaded, Workspace(root).store, Workspace(root).digests())
    return [str(problem) for problem in plan.problems]


def test_a_plan_names_a_missing_mpirun_once(tmp_path: Path, elsewhere: Path) -> None:
    config = write_build(tmp_path, mapping={"tp": 2}, build={"launch": "mpirun"})
    found = [text for text in _plan_errors(config, tmp_path) if "mpirun" in text]
    line = config.read_text().splitlines().index("  launch: mpirun") + 1
    assert found == [
        f"{config}:{line}: build.launch: mpirun is not installed; fix: pip install 'trtpipe[mpi]', "
        "or use launch: sequential"
    ]
    loaded = load_config(config)
    plan = make_plan(loaded, Workspace(tmp_path).store, Workspace(tmp_path).digests())
    with pytest.raises(ToolError):
        plan.raise_problems()


def test_a_plan_names_a_hostfile_that_cannot_be_read(tmp_path: Path) -> None:
    config = write_build(tmp_path, build={"launch": "mpirun", "hostfile": "hosts"})
    found = [text for text in _plan_errors(config, tmp_path) if "hosts" in text]
    assert len(found) == 1
    assert f"build.hostfile: {tmp_path / 'hosts'}: cannot be read: " in found[0]
    (tmp_path / "hosts").write_text("localhost\n")
    assert not [text for text in _plan_errors(config, tmp_path) if "hosts" in text]


def test_a_hostfile_is_for_mpirun(tmp_path: Path) -> None:
    config = write_build(tmp_path, build={"hostfile": "hosts"})
    with pytest.raises(
        ConfigError, match="hostfile with launch sequential; allowed: with launch mpirun"
    ):
        load_config(config)


def test_where_ranks_run_changes_no_key(tmp_path: Path) -> None:
    keys = []
    for build in ({}, {"launch": "mpirun", "hostfile": "hosts", "max_memory_gb": 3.5}):
        (tmp_path / "hosts").write_text("localhost\n")
        loaded = load_config(write_build(tmp_path, build=build))
        plan = make_plan(loaded, Workspace(tmp_path).store, Workspace(tmp_path).digests())
        action = plan.step("build").action
        assert action is not None
        keys.append(action.key)
    assert keys[0] == keys[1]


def test_too_few_slots_of_a_file() -> None:
    problem = refusal(NO_SLOTS, 4, Path("/y/hosts"))
    assert str(problem).startswith(
        "/y/hosts: has too few slots for 4 ranks; fix: raise slots= there"
    )
