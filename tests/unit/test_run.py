"""A whole build of a tiny model: hits, misses, failures, two at once, and what is never visible."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import GateError, StageError
from pipeline.explain import explain
from pipeline.plan import Step, make_plan
from pipeline.progress import Progress, SilentProgress
from pipeline.publish import damaged_files
from pipeline.run import RunResult, run
from pipeline.store import LOG
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.hub import LocalHub, serve_hub
from tests.run_views import Recorder


def _run(config: Path, root: Path, view: Recorder | None = None) -> RunResult:
    return run(load_config(config), Workspace(root), view or Recorder())


def _visible(root: Path) -> set[str]:
    """What a user sees under engines/ and triton_repo/."""
    return {
        path.relative_to(root).as_posix()
        for parent in (root / "engines", root / "triton_repo")
        if parent.exists()
        for path in parent.iterdir()
        if path.name != ".store"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A finished fp16 build; tests leave it as it is."""
    root = tmp_path_factory.mktemp("built")
    return root, _run(write_build(root), root)


def test_a_build_publishes_engine_and_repository(built: tuple[Path, RunResult]) -> None:
    root, result = built
    assert result.executed == ("fetch", "convert", "build", "verify", "serve")
    assert _visible(root) == {"engines/tiny", "triton_repo/tiny"}
    for directory in (result.engine_dir, result.repository_dir):
        manifest = json.loads((directory / "manifest.json").read_text())
        assert damaged_files(directory, manifest) == []
    names = {path.name for path in result.engine_dir.iterdir()}
    assert {"config.json", "rank0.onnx", "rank0.weights", "tokenizer", "report.html"} <= names
    assert not list((root / "engines" / ".store" / "work").iterdir())


def test_a_second_run_does_nothing(built: tuple[Path, RunResult]) -> None:
    root, _ = built
    before = (root / "engines" / "tiny").stat().st_ino
    result = _run(root / "tiny.yaml", root)
    assert result.executed == ()
    assert not result.published
    assert (root / "engines" / "tiny").stat().st_ino == before


def test_other_ports_or_another_target_reach_the_manifest(
    built: tuple[Path, RunResult],
) -> None:
    root, result = built
    original = (root / "tiny.yaml").read_text()
    data = yaml.safe_load(original)
    data["serve"] = {"http_port": 9000}
    data["target"] = "l4"
    (root / "tiny.yaml").write_text(yaml.safe_dump(data))
    again = _run(root / "tiny.yaml", root)
    (root / "tiny.yaml").write_text(original)
    assert again.executed == ()
    assert again.published
    manifest = json.loads((result.repository_dir / "manifest.json").read_text())
    assert manifest["config"]["serve"]["http_port"] == 9000
    assert manifest["config"]["target"] == "l4"


def test_a_changed_published_file_is_made_anew(built: tuple[Path, RunResult]) -> None:
    """Published files are hard links into the store, so a change there is a change here."""
    root, result = built
    weights = result.engine_dir / "rank0.weights"
    good = weights.read_bytes()
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff")
    manifest = json.loads((result.engine_dir / "manifest.json").read_text())
    assert "run the build again" in str(damaged_files(result.engine_dir, manifest)[0])
    again = _run(root / "tiny.yaml", root)
    assert "build" in again.executed
    assert weights.read_bytes() == good
    manifest = json.loads((result.engine_dir / "manifest.json").read_text())
    assert damaged_files(result.engine_dir, manifest) == []


def test_weights_that_change_during_a_run_are_refused(tmp_path: Path) -> None:
    config = write_build(tmp_path)
    weights = tmp_path / "weights" / "model.safetensors"
    original = weights.read_bytes()

    class Meddler(Recorder):
        def stage_starts(self, step: Step) -> Progress:
            if step.stage.name == "convert":
                weights.write_bytes(original[:-2000] + bytes(2000))
            return SilentProgress()

    with pytest.raises(StageError, match=r"model\.safetensors: changed while it was being read"):
        _run(config, tmp_path, Meddler())
    assert _visible(tmp_path) == set()
    weights.write_bytes(original)
    assert "convert" in _run(config, tmp_path).executed


def test_explain_names_the_changed_field(built: tuple[Path, RunResult]) -> None:
    root, _ = built
    data = yaml.safe_load((root / "tiny.yaml").read_text())
    data["build"]["max_batch_size"] = 3
    (root / "three.yaml").write_text(yaml.safe_dump(data))
    workspace = Workspace(root)
    plan = make_plan(load_config(root / "three.yaml"), workspace.store, workspace.digests())
    reasons = explain(plan, workspace.store, {})
    assert reasons["convert"] == []
    assert reasons["build"] == ["config.max_batch_size: 2 -> 3"]
    assert len(reasons["verify"]) == 1
    assert reasons["verify"][0].startswith("inputs.engine: ")


def test_a_removed_published_file_comes_back(built: tuple[Path, RunResult]) -> None:
    root, result = built
    (result.engine_dir / "report.html").unlink()
    again = _run(root / "tiny.yaml", root)
    assert again.executed == ()
    assert again.published
    assert (result.engine_dir / "report.html").is_file()


def test_a_failed_gate_publishes_nothing_and_keeps_the_report(tmp_path: Path) -> None:
    config = write_build(tmp_path, verify={"gates": {"max_mean_kl": 1e-30}})
    view = Recorder()
    with pytest.raises(GateError) as caught:
        _run(config, tmp_path, view)
    assert caught.value.exit_code == 6
    problem = caught.value.problems[0]
    assert problem.where.endswith("verify.gates.max_mean_kl")
    assert "was measured" in problem.what
    assert problem.allowed == "<= 1e-30"
    assert _visible(tmp_path) == set()
    (kept,) = (tmp_path / "engines" / ".store" / "failed").iterdir()
    assert {LOG, "report.json", "report.html"} <= {path.name for path in kept.iterdir()}
    assert any(str(kept / LOG) in line for line in view.lines)


def test_a_killed_stage_is_named_and_only_it_runs_again(tmp_path: Path) -> None:
    config = write_build(tmp_path)

    class Killer(Recorder):
        def stage_starts(self, step: Step) -> Progress:
            if step.stage.name == "verify":
                subprocess.Popen([sys.executable, "-c", _KILL, str(os.getpid())])
            return SilentProgress()

    with pytest.raises(StageError, match="stage verify: was killed by signal 9"):
        _run(config, tmp_path, Killer())
    assert _visible(tmp_path) == set()
    assert _run(config, tmp_path).executed == ("verify", "serve")


# Kills the first child of a process that runs the stage worker.
_KILL = """
import os, sys, time
parent = sys.argv[1]
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
            command = open(f"/proc/{pid}/cmdline", errors="replace").read()
        except OSError:
            continue
        if stat[1] == parent and command.split("\\0")[1:3] == ["-m", "pipeline.stages.worker"]:
            os.kill(int(pid), 9)
            sys.exit()
    time.sleep(0.005)
"""


def test_weights_from_the_hub_are_checked_once_they_are_here(tmp_path: Path) -> None:
    """The whole way over a hub on loopback; a bad limit is refused right after the download."""
    write_build(tmp_path)
    revision = "0123456789abcdef0123456789abcdef01234567"
    hub = LocalHub(tmp_path / "weights", "someone/tiny", revision)
    data = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    data["model"] = {"source": "hub", "id": "someone/tiny", "revision": revision}
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(data))
    data["build"]["max_seq_len"] = 4096
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(data))
    with serve_hub(hub):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        plan, run_long, run_all = (
            _command(tmp_path, environment, verb, name)
            for verb, name in (("plan", "hub.yaml"), ("run", "long.yaml"), ("run", "hub.yaml"))
        )
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["forecast"] is None
    assert run_long.returncode == 2, run_long.stderr
    assert "max_position_embeddings" in run_long.stderr
    assert "convert" not in run_long.stderr
    assert run_all.returncode == 0, run_all.stderr
    assert json.loads(run_all.stdout)["executed"] == ["convert", "build", "verify", "serve"]


def _command(
    root: Path, environment: dict[str, str], verb: str, config: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", verb, config, "--json"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _start(config: Path, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(config), "--json"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_build_may_end_with_the_checkpoint_of_any_mapping(tmp_path: Path) -> None:
    config = write_build(tmp_path, mapping={"tp": 2, "pp": 2}, build={"backend": "none"})
    result = _run(config, tmp_path)
    assert result.executed == ("fetch", "convert")
    assert result.repository_dir is None
    assert _visible(tmp_path) == {"engines/tiny"}
    names = {path.name for path in result.engine_dir.iterdir()}
    assert names == {"config.json", "manifest.json", *(f"rank{r}.safetensors" for r in range(4))}
    assert _run(config, tmp_path).executed == ()


def test_two_runs_at_once_make_everything_once(tmp_path: Path) -> None:
    config = write_build(tmp_path)
    runs = [_start(config, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    executed = [stage for out, _ in outputs for stage in json.loads(out)["executed"]]
    assert sorted(executed) == ["build", "convert", "fetch", "serve", "verify"]
    said = "".join(errors for _, errors in outputs)
    assert ": another run is making the same artifact; waiting for it" in said
    assert _visible(tmp_path) == {"engines/tiny", "triton_repo/tiny"}


@pytest.mark.parametrize(
    ("how", "when"),
    [
        (signal.SIGINT, "pipeline.stages.worker"),
        (signal.SIGTERM, "pipeline.engine.worker"),
        (signal.SIGKILL, "pipeline.engine.worker"),
    ],
)
def test_an_interrupted_run_leaves_no_process_and_nothing_visible(
    tmp_path: Path, how: signal.Signals, when: str
) -> None:
    config = write_build(tmp_path)
    process = _start(config, tmp_path)
    work = tmp_path / "engines" / ".store" / "work"
    deadline = time.monotonic() + 120
    while not _workers_in(tmp_path, when) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how is not signal.SIGKILL:
        assert process.returncode == 130
        assert "interrupted" in errors
        assert not list(work.iterdir())
    assert _visible(tmp_path) == set()
    deadline = time.monotonic() + 30  # a worker that was still importing has to notice first
    while _workers_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _workers_in(tmp_path)
    if how is signal.SIGKILL:  # nobody was left to tidy up, so the next run does, whatever it makes
        assert list(work.iterdir())
        _run(write_build(tmp_path, build={"backend": "none"}), tmp_path)
        assert not list(work.iterdir())
        write_build(tmp_path)
    assert set(_run(config, tmp_path).executed) >= {"verify", "serve"}


def _workers_in(directory: Path, module: str = "pipeline.") -> list[str]:
    """Command lines of all workers alive that were started in a directory."""
    return [
        command
        for process in Path("/proc").glob("[0-9]*")
        if (command := _worker_command(process, directory)) and module in command
    ]


def _worker_command(process: Path, directory: Path) -> str | None:
    try:
        command = (process / "cmdline").read_text(errors="replace")
        if "worker" in command and (process / "cwd").readlink() == directory:
            return command
    except OSError:  # it ended meanwhile
        pass
    return None
