"""What happens to a run when the world changes under it: its YAML, the room on its disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import ExitCode, StageError
from pipeline.plan import Step
from pipeline.progress import Progress
from pipeline.run import run
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder
from tests.unit.test_disk import mounted

LEFT_BYTES = 64 << 10
"""Of room when the build starts: enough for its log, not for its network's weights."""


class _Disturber(Recorder):
    """Calls `disturb` when a stage starts."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self._stage = stage

    def stage_starts(self, step: Step) -> Progress:
        if step.stage.name == self._stage:
            self.disturb()
        return super().stage_starts(step)

    def disturb(self) -> None:
        raise NotImplementedError


def test_a_run_makes_what_its_yaml_said_at_the_start(tmp_path: Path) -> None:
    base = write_build(tmp_path, build={"backend": "none"})
    config = tmp_path / "variant.yaml"
    config.write_text("extends: tiny.yaml\n")

    class Editor(_Disturber):
        def disturb(self) -> None:
            data = yaml.safe_load(base.read_text())
            base.write_text(yaml.safe_dump({**data, "mapping": {"tp": 2}}))

    view = Editor("convert")
    result = run(load_config(config), Workspace(tmp_path), view)
    assert [line for line in view.lines if "changed" in line] == [
        f"{base} was changed while this run was under way: what was made is what it said at the "
        "start; run again for the rest"
    ]
    manifest = json.loads((result.engine_dir / "manifest.json").read_text())
    assert manifest["config"]["mapping"]["tp"] == 1
    assert not (result.engine_dir / "rank1.safetensors").exists()
    again = Recorder()
    assert run(load_config(config), Workspace(tmp_path), again).executed == ("convert",)
    assert not [line for line in again.lines if "changed" in line]
    assert (result.engine_dir / "rank1.safetensors").exists()
    quiet = Editor("nothing")
    loaded = load_config(config)
    base.unlink()
    run(loaded, Workspace(tmp_path), quiet)
    assert len([line for line in quiet.lines if "changed" in line]) == 1


def test_a_disk_that_fills_up_during_the_build(tmp_path: Path) -> None:
    """Nothing half-written is published; with room again, only what was missing is made."""
    config = write_build(tmp_path)
    engines = tmp_path / "engines"
    with mounted(engines, "size=64m") as is_mounted:
        if not is_mounted:
            pytest.skip("this user may not mount a file system to fill it")

        class Filler(_Disturber):
            def disturb(self) -> None:
                room = shutil.disk_usage(engines).free - LEFT_BYTES
                (engines / "filler").write_bytes(bytes(room))

        with pytest.raises(StageError, match="No space left on device") as caught:
            run(load_config(config), Workspace(tmp_path), Filler("build"))
        assert caught.value.exit_code == ExitCode.STAGE
        assert caught.value.problems[0].fix == "free some space there, or run in another directory"
        assert not (engines / "tiny").exists()
        assert not (tmp_path / "triton_repo" / "tiny").exists()
        assert list((engines / ".store" / "work").iterdir()) == []
        (engines / "filler").unlink()
        result = run(load_config(config), Workspace(tmp_path), Recorder())
        assert result.executed == ("build", "verify", "serve")
