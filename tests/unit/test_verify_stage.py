"""What the verify stage asks for before it runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.stages import STAGES
from tests.build_config import write_build

VERIFY = STAGES["verify"]


@pytest.mark.parametrize("mapping", [{"tp": 2}, {"pp": 2}])
def test_several_ranks_need_mpi_however_they_are_built(
    tmp_path: Path, mapping: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_config(write_build(tmp_path, mapping=mapping, build={"launch": "sequential"}))
    assert "mpi4py" in VERIFY.needs(loaded)
    assert VERIFY.tool_problems(loaded) == ()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = VERIFY.tool_problems(loaded)
    assert "tiny.yaml" in problem.where
    assert problem.what == "mpirun is not installed"
    assert problem.fix.startswith("pip install 'trtpipe[mpi]'")


def test_one_rank_needs_no_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_config(write_build(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "mpi4py" not in VERIFY.needs(loaded)
    assert VERIFY.tool_problems(loaded) == ()
