"""run.keep: needed drops what nothing needs any more, never what another needs, and remakes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import LoadedConfig, load_config
from pipeline.console import ConsoleView
from pipeline.errors import StageError
from pipeline.explain import explain
from pipeline.keeping import Keeper
from pipeline.plan import Plan, Step, make_plan
from pipeline.publish import damaged_files
from pipeline.run import RunResult, run
from pipeline.run_config import RunConfig
from pipeline.store import Action, Store
from pipeline.workspace import Workspace
from tests.build_config import SHAPE, write_build
from tests.run_views import Recorder

NEEDED = {"run": {"keep": "needed"}}


def _run(config: Path, root: Path, view: Recorder | None = None) -> RunResult:
    return run(load_config(config), Workspace(root), view or Recorder())


def _plan(loaded: LoadedConfig, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(loaded, workspace.store, workspace.digests())


def _states(config: Path, root: Path) -> dict[str, str]:
    return {step.stage.name: step.status for step in _plan(load_config(config), root).steps}


def _action(config: Path, root: Path, stage: str) -> Action:
    action = _plan(load_config(config), root).step(stage).action
    assert action is not None
    return action


def _in_store(root: Path, stage: str) -> bool:
    return any((root / "engines" / ".store" / stage).glob("*/manifest.json"))


def _variant(config: Path, name: str, **sections: Any) -> Path:
    """The same YAML under another name; sections are merged."""
    data = yaml.safe_load(config.read_text())
    for section, values in sections.items():
        data[section] = {**data.get(section, {}), **values}
    path = config.with_name(f"{name}.yaml")
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A finished rehearsal that dropped what it could; tests leave it as it is."""
    root = tmp_path_factory.mktemp("kept")
    write_build(root)
    model = {"source": "synthetic", "shape": SHAPE}
    config = _variant(root / "tiny.yaml", "small", **NEEDED)
    data = {**yaml.safe_load(config.read_text()), "model": model}
    config.write_text(yaml.safe_dump(data))
    view = Recorder()
    _run(config, root, view)
    return config, view


def test_what_nothing_needs_is_dropped(built: tuple[Path, Recorder]) -> None:
    config, view = built
    root = config.parent
    kept = {
        stage: _in_store(root, stage) for stage in ("fetch", "convert", "build", "verify", "serve")
    }
    assert kept == {"fetch": False, "convert": False, "build": True, "verify": True, "serve": True}
    dropped = [line for line in view.lines if "dropped" in line]
    assert [line.partition(":")[0] for line in dropped] == ["convert", "fetch"]
    assert all(" MB freed (run.keep: needed)" in line for line in dropped)
    manifest = json.loads((root / "engines" / "small" / "manifest.json").read_text())
    assert damaged_files(root / "engines" / "small", manifest) == []


def test_the_next_run_has_nothing_to_do(
    built: tuple[Path, Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = built
    root = config.parent
    assert _states(config, root) == {
        "fetch": "not needed",
        "convert": "not needed",
        "build": "done",
        "verify": "done",
        "serve": "done",
    }
    plan = _plan(load_config(config), root)
    published = json.loads((root / "engines" / "small" / "manifest.json").read_text())
    reasons = explain(plan, Workspace(root).store, published["actions"])
    assert all(lines == [] for lines in reasons.values())
    result = run(load_config(config), Workspace(root), ConsoleView())
    assert result.executed == ()
    assert not result.published
    assert capsys.readouterr().err.count("not needed") == 2


def test_keeping_all_later_makes_nothing_again(built: tuple[Path, Recorder]) -> None:
    config, _ = built
    loaded = load_config(config).replaced(run=RunConfig(keep="all"))
    assert {step.status for step in _plan(loaded, config.parent).steps} == {"done", "not needed"}


def test_what_explains_an_artifact_stays(built: tuple[Path, Recorder]) -> None:
    config, _ = built
    store = Workspace(config.parent).store
    for stage, facts in (("fetch", {"bytes", "source"}), ("convert", {"bytes", "ranks"})):
        dropped = store.dropped(_action(config, config.parent, stage))
        assert dropped is not None
        assert set(dropped.facts) == facts
        assert {path.name for path in dropped.path.iterdir()} == {"manifest.json", "stage.log"}


def test_a_change_says_what_it_makes_again(built: tuple[Path, Recorder]) -> None:
    config, _ = built
    root = config.parent
    other = _variant(config, "three", build={"max_batch_size": 3})
    plan = _plan(load_config(other), root)
    assert {step.stage.name: step.status for step in plan.steps} == dict.fromkeys(
        ("fetch", "convert", "build", "verify", "serve"), "to do"
    )
    reasons = explain(plan, Workspace(root).store, {})
    why = ["was dropped (run.keep: needed), and a stage that would run reads it"]
    assert reasons["fetch"] == reasons["convert"] == why


@pytest.mark.slow
def test_a_quantized_model_is_made_again_for_another_mapping(tmp_path: Path) -> None:
    config = write_build(
        tmp_path, fmt="int4_awq", build={"backend": "none"}, quantize={"algorithm": "rtn"}, **NEEDED
    )
    assert _run(config, tmp_path).executed == ("fetch", "quantize", "convert")
    # Of local weights the store has links, which take no room; the converted checkpoint is published.
    states = {"fetch": "done", "quantize": "not needed", "convert": "done"}
    assert _states(config, tmp_path) == states
    dropped = Workspace(tmp_path).store.dropped(_action(config, tmp_path, "quantize"))
    assert dropped is not None
    assert (dropped.path / "quant_report.json").is_file()
    data = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**data, "mapping": {"tp": 2}}))
    assert _states(config, tmp_path) == {"fetch": "done", "quantize": "to do", "convert": "to do"}
    result = _run(config, tmp_path)
    assert result.executed == ("quantize", "convert")
    assert len(list(result.engine_dir.glob("rank*.safetensors"))) == 2
    assert not _in_store(tmp_path, "quantize")


# From here to the next note: what a run would leave, without running it.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A quantized build of which every artifact is in the store."""
    weights = write_build(tmp_path / "model").with_name("weights")
    model = {"source": "directory", "path": str(weights)}
    config = _variant(write_build(tmp_path, fmt="int4_awq", **NEEDED), "stored", model=model)
    store = Workspace(tmp_path).store
    for step in _plan(load_config(config), tmp_path).steps:
        assert step.action is not None
        _committed(store, step.action)
    return config


def _kept(config: Path, said: list[str] | None = None) -> set[str]:
    """Stages whose artifacts are left by a run that found them all."""
    root, lines = config.parent, [] if said is None else said
    with Keeper(load_config(config), Workspace(root), lines.append) as keeper:
        steps = keeper.hold(_plan(load_config(config), root).steps)
        keeper.let_go(steps, ())
    stages = ("fetch", "quantize", "convert", "build", "verify", "serve")
    return {stage for stage in stages if _in_store(root, stage)}


FINAL = {"build", "verify", "serve"}


def test_all_that_is_not_published_goes(stored: Path) -> None:
    assert _kept(stored) == FINAL


def test_another_mapping_needs_it_again(stored: Path) -> None:
    _kept(stored)
    data = yaml.safe_load(stored.read_text())
    stored.write_text(yaml.safe_dump({**data, "mapping": {"pad_ffn": True}}))
    assert set(_states(stored, stored.parent).values()) == {"to do"}


def test_what_another_run_holds_stays_until_the_last_lets_go(stored: Path) -> None:
    workspace = Workspace(stored.parent)
    hold = workspace.store.hold(_action(stored, stored.parent, "convert"))
    assert _kept(stored) == {"convert", *FINAL}
    hold.release()
    said: list[str] = []
    assert _kept(stored, said) == FINAL
    assert said == ["convert: dropped, 34 B freed (run.keep: needed)"]


def test_what_another_run_is_making_stays(stored: Path) -> None:
    key = _action(stored, stored.parent, "quantize").key
    with Workspace(stored.parent).store.lock(key, lambda: None):
        assert _kept(stored) == {"quantize", *FINAL}


@pytest.mark.parametrize(
    ("config", "stages", "kept"),
    [
        ({"run": {"keep": "all"}}, ("quantize", "convert", "build"), {"quantize", "convert"}),
        ({}, ("quantize",), {"quantize"}),  # of an earlier version, which had no `run`
        ({"run": {"keep": "needed"}}, ("quantize", "convert", "build"), set()),
        ({"run": {"keep": "needed"}}, ("quantize", "convert"), {"convert"}),
    ],
)
def test_what_another_build_shall_keep_stays(
    stored: Path, config: dict[str, Any], stages: tuple[str, ...], kept: set[str]
) -> None:
    """All of one that keeps all; of others what they publish."""
    root = stored.parent
    keys = {stage: _action(stored, root, stage).key for stage in stages}
    for name, content in (("other", {"config": config, "keys": keys}), ("broken", []), ("own", 1)):
        (root / "engines" / name).mkdir()
        (root / "engines" / name / "manifest.json").write_text(json.dumps(content))
    assert _kept(stored) == {*kept, *FINAL}


# Whole runs again.


@pytest.mark.slow
def test_two_runs_at_once(tmp_path: Path) -> None:
    """One makes, the other waits; whoever needs an artifact last drops it."""
    config = write_build(tmp_path, **NEEDED)
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--json"]
    runs = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    executed = [stage for out, _ in outputs for stage in json.loads(out)["executed"]]
    assert sorted(executed) == ["build", "convert", "fetch", "serve", "verify"]
    assert not _in_store(tmp_path, "convert")
    assert _run(config, tmp_path).executed == ()


@pytest.mark.slow
def test_a_result_that_is_removed_while_its_input_is_dropped(tmp_path: Path) -> None:
    config = write_build(tmp_path, **NEEDED)
    result = _run(config, tmp_path)
    weights = result.artifacts["build"].path / "rank0.weights"

    class Meddler(Recorder):
        def stage_hit(self, step: Step) -> None:
            if step.stage.name == "convert":
                weights.unlink()

    with pytest.raises(StageError, match=r"stage build: what was made of it .*; fix: run again"):
        _run(config, tmp_path, Meddler())
    assert _run(config, tmp_path).executed[:2] == ("convert", "build")


def _committed(store: Store, action: Action) -> Path:
    work_dir = store.new_work_dir(action)
    (work_dir / "data").mkdir()
    for name in ("weights", "stage.log", "quant_report.json", "data/block"):
        (work_dir / name).write_text(name)
    return store.commit(action, work_dir, {"bytes": 7}).path


def test_a_drop_that_was_killed_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, action = Store(tmp_path), Action("convert", 1)
    path = _committed(store, action)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.store._keep_what_explains", _killed)
        with pytest.raises(KeyboardInterrupt):
            store.drop(action)
    assert not path.exists()
    dropped = store.dropped(action)
    assert dropped is not None
    assert (dropped.path / "weights").is_file()
    store.remove_dead_work()
    names = {path.name for path in dropped.path.iterdir()}
    assert names == {"manifest.json", "stage.log", "quant_report.json"}
    _committed(store, action)
    assert store.dropped(action) is None
    assert store.lookup(action) is not None


def _killed(directory: Path) -> None:
    raise KeyboardInterrupt
