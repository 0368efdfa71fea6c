"""Executes a plan: hits, misses, locks, one child process per stage, publishing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from pipeline import __version__, errors
from pipeline.config import LoadedConfig
from pipeline.errors import PipelineError, Problem, StageError
from pipeline.plan import Plan, Step, make_plan
from pipeline.progress import Progress
from pipeline.publish import link_tree, publish
from pipeline.stages.worker import Job
from pipeline.store import LOG, MANIFEST, Artifact
from pipeline.workspace import Workspace

_LOG_TAIL_LINES = 12
_EVIDENCE = ("*.log", "report.*")
"""What is kept of a stage that failed."""


class RunView(Protocol):
    """Who watches a run: a terminal, plain lines, or nobody."""

    def stage_hit(self, step: Step) -> None:
        """The artifact exists."""

    def stage_starts(self, step: Step) -> Progress:
        """A stage is about to run; returns where its progress goes."""

    def stage_done(self, step: Step, seconds: float, facts: dict[str, Any]) -> None:
        """A stage has finished."""

    def say(self, text: str) -> None:
        """One line."""


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        engine_dir: the published engine.
        repository_dir: the published Triton model repository.
        artifacts: stage -> artifact.
        executed: stages that were not hits.
        published: whether anything visible changed.
    """

    engine_dir: Path
    repository_dir: Path
    artifacts: dict[str, Artifact]
    executed: tuple[str, ...]
    published: bool


def run(loaded: LoadedConfig, workspace: Workspace, view: RunView) -> RunResult:
    """Make everything that is missing, then publish.

    Raises:
        PlanError, ToolError, CheckpointError: the plan has problems; nothing was started.
        PipelineError: a stage failed; nothing was published, its log is kept under failed/.
    """
    plan = _plan_with_keys(loaded, workspace, view)
    artifacts: dict[str, Artifact] = {}
    executed = []
    for step in plan.steps:
        name = step.stage.name
        artifact = _current_artifact(step, workspace, loaded)
        if artifact is None:
            artifact, ran = _make(step, loaded, workspace, artifacts, view)
            executed += [name] if ran else []
        else:
            view.stage_hit(step)
        artifacts[name] = artifact
        if (
            name == "fetch" and name in executed
        ):  # now the weights can be checked, before hours go by
            make_plan(loaded, workspace.store, workspace.digests()).raise_problems()
    published = _publish(loaded, workspace, artifacts)
    return RunResult(
        engine_dir=workspace.engines_dir / loaded.config.name,
        repository_dir=workspace.repositories_dir / loaded.config.name,
        artifacts=artifacts,
        executed=tuple(executed),
        published=published,
    )


def _plan_with_keys(loaded: LoadedConfig, workspace: Workspace, view: RunView) -> Plan:
    """Plan; read large external files once if that is what it takes to know the keys."""
    digests = workspace.digests()
    plan = make_plan(loaded, workspace.store, digests)
    plan.raise_problems()
    if plan.unhashed_bytes:
        view.say(f"hashing {plan.unhashed_bytes / 1e9:.1f} GB of the original checkpoint, once")
        for step in plan.steps:
            for paths in step.stage.external_files(loaded).values():
                for path in paths:
                    digests.digest(path)
        digests.save()
        plan = make_plan(loaded, workspace.store, digests)
    digests.save()
    return plan


def _current_artifact(step: Step, workspace: Workspace, loaded: LoadedConfig) -> Artifact | None:
    assert step.action is not None
    artifact = workspace.store.lookup(step.action)
    if artifact is not None and step.stage.is_current(loaded, artifact.path):
        return artifact
    return None


def _make(
    step: Step,
    loaded: LoadedConfig,
    workspace: Workspace,
    artifacts: dict[str, Artifact],
    view: RunView,
) -> tuple[Artifact, bool]:
    """Run one stage under the lock of its key; False if another process made it meanwhile."""
    action = step.action
    assert action is not None
    waiting = f"{step.stage.name}: another run is making the same artifact; waiting for it"
    with workspace.store.lock(action.key, lambda: view.say(waiting)):
        other = _current_artifact(step, workspace, loaded)
        if other is not None:
            view.stage_hit(step)
            return other, False
        progress = view.stage_starts(step)
        inputs = {role: artifacts[name].path for role, name in step.inputs.items()}
        started = time.monotonic()
        try:
            work_dir = workspace.store.new_work_dir(action)
            facts = _run_in_child(step, loaded, inputs, work_dir, progress)
            artifact = workspace.store.commit(action, work_dir, facts)
        except BaseException as error:  # Ctrl-C too: the unfinished directory goes, the log stays
            kept = workspace.store.keep_failure(action, _EVIDENCE)
            if isinstance(error, PipelineError):
                view.say(f"log: {kept / LOG}")
            raise
    view.stage_done(step, time.monotonic() - started, facts)
    return artifact, True


def _run_in_child(
    step: Step,
    loaded: LoadedConfig,
    inputs: dict[str, Path],
    work_dir: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Start the stage's process, follow its progress, return its facts or raise its error."""
    read_fd, write_fd = os.pipe()
    log_path = work_dir / LOG
    job = Job(
        stage=step.stage.name,
        loaded=loaded,
        inputs=inputs,
        out_dir=work_dir,
        log_path=log_path,
        report_fd=write_fd,
        parent_pid=os.getpid(),
    )
    with log_path.open("wb") as log, os.fdopen(read_fd) as pipe:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.stages.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write_fd,),
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")},
        )
        os.close(write_fd)
        try:
            assert child.stdin is not None
            child.stdin.write(job.model_dump_json())
            child.stdin.close()
            result = _follow(pipe, progress)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if result is None:
        raise StageError(_death(step, code, log_path))
    if result["event"] == "error":
        kind: type[PipelineError] = getattr(errors, result["kind"])
        raise kind(Problem(**problem) for problem in result["problems"])
    facts: dict[str, Any] = result["facts"]
    return facts


def _follow(pipe: TextIO, progress: Progress) -> dict[str, Any] | None:
    """Pass progress on until the pipe closes; the last message if it is a result."""
    handlers: dict[str, Callable[[dict[str, Any]], None]] = {
        "start": lambda message: progress.start(message["total"], message["unit"]),
        "advance": lambda message: progress.advance(message["note"]),
        "say": lambda message: progress.say(message["text"]),
    }
    result = None
    for line in pipe:
        message: dict[str, Any] = json.loads(line)
        handler = handlers.get(message["event"])
        if handler is None:
            result = message
        else:
            handler(message)
    return result


def _death(step: Step, code: int, log_path: Path) -> Problem:
    """The problem of a stage that ended without a word: a bug, or a kill."""
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    fix = ""
    if code == -9:
        fix = "usually the kernel ran out of memory: close other programs, or use a larger machine"
    lines = log_path.read_text("utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    tail = "\n".join(f"    {line}" for line in lines)
    return Problem(f"stage {step.stage.name}", f"{cause}; the end of its log:\n{tail}\n", fix=fix)


def _publish(loaded: LoadedConfig, workspace: Workspace, artifacts: dict[str, Artifact]) -> bool:
    """Make engine and repository visible, each in one step; False if they are there already."""
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    manifest = {
        "schema": 1,
        "made_by": f"trtpipe {__version__}",
        "name": loaded.config.name,
        "rehearsal": loaded.rehearsal,
        "config": loaded.config.model_dump(mode="json"),
        "keys": keys,
        "actions": {name: artifact.manifest["action"] for name, artifact in artifacts.items()},
        "facts": {name: artifact.facts for name, artifact in artifacts.items()},
    }

    def fill_engine(directory: Path) -> None:
        link_tree(artifacts["build"].path, directory)
        link_tree(artifacts["verify"].path, directory)

    def fill_repository(directory: Path) -> None:
        link_tree(artifacts["serve"].path, directory)

    changed = False
    for parent, fill in (
        (workspace.engines_dir, fill_engine),
        (workspace.repositories_dir, fill_repository),
    ):
        destination = parent / loaded.config.name
        if _is_published(destination, keys):
            continue
        with workspace.store.lock(f"publish-{parent.name}-{loaded.config.name}", lambda: None):
            publish(fill, destination, manifest=manifest)
        changed = True
    return changed


def _is_published(destination: Path, keys: dict[str, str]) -> bool:
    try:
        manifest = json.loads((destination / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    files_intact = all(
        (destination / name).is_file() and (destination / name).stat().st_size == entry["bytes"]
        for name, entry in manifest.get("files", {}).items()
    )
    return bool(manifest.get("keys") == keys and files_intact)
