"""Executes a plan: hits, misses, locks, one child process per stage, publishing."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline import __version__
from pipeline.config import LoadedConfig
from pipeline.disk import write_problem
from pipeline.errors import PipelineError, Problem, StageError
from pipeline.explain import changed_fields
from pipeline.external import DigestCache
from pipeline.plan import Plan, Step, external_files, make_plan
from pipeline.progress import Progress
from pipeline.publish import link_tree, publish
from pipeline.stage_process import run_stage
from pipeline.store import LOG, MANIFEST, Action, Artifact, is_unchanged
from pipeline.workspace import Workspace

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
        engine_dir: the published engine, or the converted checkpoint where the build ends with it.
        repository_dir: the published Triton model repository; None where the build ends earlier.
        artifacts: stage -> artifact.
        executed: stages that were not hits.
        published: whether anything visible changed.
    """

    engine_dir: Path
    repository_dir: Path | None
    artifacts: dict[str, Artifact]
    executed: tuple[str, ...]
    published: bool


def run(loaded: LoadedConfig, workspace: Workspace, view: RunView) -> RunResult:
    """Make everything that is missing, then publish.

    Raises:
        PlanError, ToolError, CheckpointError: the plan has problems; nothing was started.
        StageError: a directory cannot be written; nothing was started.
        PipelineError: a stage failed; nothing was published, its log is kept under failed/.
    """
    digests = workspace.digests()
    plan = _plan_with_keys(loaded, workspace, digests, view)
    workspace.store.remove_dead_work()
    maker = _Maker(loaded, workspace, digests, view)
    fetch = plan.step("fetch")
    maker.make(fetch)
    if maker.executed:
        # Now the weights can be checked, before hours go by; they may be quantized already, too.
        plan = make_plan(loaded, workspace.store, digests)
        plan.raise_problems()
    for step in plan.steps:
        if step.stage is not fetch.stage:
            maker.make(step)
    published = _publish(loaded, workspace, maker.artifacts)
    return RunResult(
        engine_dir=workspace.engines_dir / loaded.config.name,
        repository_dir=(
            None if loaded.converts_only else workspace.repositories_dir / loaded.config.name
        ),
        artifacts=maker.artifacts,
        executed=tuple(maker.executed),
        published=published,
    )


def _plan_with_keys(
    loaded: LoadedConfig, workspace: Workspace, digests: DigestCache, view: RunView
) -> Plan:
    """Plan; read large external files once if that is what it takes to know the keys."""
    plan = make_plan(loaded, workspace.store, digests)
    plan.raise_problems()
    _refuse_unwritable(loaded, workspace)
    if plan.unhashed_bytes:
        view.say(f"hashing {plan.unhashed_bytes / 1e9:.1f} GB of the original checkpoint, once")
        for path in external_files(loaded, plan.steps):
            digests.digest(path)
        plan = make_plan(loaded, workspace.store, digests)
    digests.save()
    return plan


def _refuse_unwritable(loaded: LoadedConfig, workspace: Workspace) -> None:
    """Say before hours go by that the result could not be written."""
    found = [write_problem(workspace.engines_dir) or write_problem(workspace.store.root)]
    if not loaded.converts_only:
        found.append(write_problem(workspace.repositories_dir))
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise StageError(problems)


class _Maker:
    """Makes the artifacts of one run, step by step.

    Attributes:
        artifacts: stage -> artifact, of every step so far.
        executed: stages that had to run.
    """

    def __init__(
        self, loaded: LoadedConfig, workspace: Workspace, digests: DigestCache, view: RunView
    ) -> None:
        self.artifacts: dict[str, Artifact] = {}
        self.executed: list[str] = []
        self._loaded = loaded
        self._store = workspace.store
        self._digests = digests
        self._view = view
        self._read: list[Path] = []  # external files that decide what was made so far

    def make(self, step: Step) -> None:
        """Take the artifact from the store, or run the stage under the lock of its key."""
        name, action = step.stage.name, step.action
        assert action is not None
        self._read += external_files(self._loaded, [step])
        artifact = self._stored(step)
        if artifact is None:
            waiting = f"{name}: another run is making the same artifact; waiting for it"
            with self._store.lock(action.key, lambda: self._view.say(waiting)):
                artifact = self._stored(step) or self._run(step, action)
        self.artifacts[name] = artifact
        if name not in self.executed:
            self._view.stage_hit(step)

    def _stored(self, step: Step) -> Artifact | None:
        assert step.action is not None
        artifact = self._store.lookup(step.action)
        if artifact is not None and step.stage.is_current(self._loaded, artifact.path):
            return artifact
        return None

    def _run(self, step: Step, action: Action) -> Artifact:
        name = step.stage.name
        progress = self._view.stage_starts(step)
        inputs = {role: self.artifacts[stage].path for role, stage in step.inputs.items()}
        started = time.monotonic()
        try:
            work_dir = self._store.new_work_dir(action)
            kept_dir = self._kept_dir(step, action)
            facts = run_stage(name, self._loaded, inputs, work_dir, progress, kept_dir)
            self._refuse_changed_files()
            artifact = self._store.commit(action, work_dir, facts)
        except BaseException as error:  # Ctrl-C too: the unfinished directory goes, the log stays
            if not step.stage.finished_parts(self._store.unfinished_dir(action)):
                self._store.remove_unfinished(action)
            kept = self._store.keep_failure(action, _EVIDENCE)
            if isinstance(error, PipelineError):
                self._view.say(f"log: {kept / LOG}")
            raise
        self.executed.append(name)
        self._view.stage_done(step, time.monotonic() - started, facts)
        return artifact

    def _kept_dir(self, step: Step, action: Action) -> Path | None:
        """Where a resumable stage finds and leaves finished parts; says what it cannot use, and why."""
        if not step.stage.resumable:
            return None
        self._store.remove_useless(action.stage, lambda path: not step.stage.finished_parts(path))
        for path, stored in self._store.unfinished(action.stage):
            if all(stored["inputs"].get(role) == action.inputs[role] for role in step.inputs):
                self._view.say(_not_used(step, action, path, stored))
        return self._store.open_unfinished(action)

    def _refuse_changed_files(self) -> None:
        """What was made of a file must carry the key of that file's content, not of an older one."""
        changed = [path for path in self._read if self._digests.peek(path) is None]
        if changed:
            what = "changed while it was being read; nothing made of it was kept"
            raise StageError(Problem(str(path), what, fix="run again") for path in changed)


def _not_used(step: Step, action: Action, path: Path, stored: dict[str, Any]) -> str:
    """One line about unfinished work on the same weights with other settings."""
    other = ", ".join(name.removeprefix("config.") for name in changed_fields(action, stored))
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return (
        f"{action.stage}: unfinished work with other {other} is not used "
        f"({step.stage.finished_parts(path)}); `rm -r {shlex.quote(str(shown))}` removes it"
    )


def _publish(loaded: LoadedConfig, workspace: Workspace, artifacts: dict[str, Artifact]) -> bool:
    """Make engine and repository visible, each in one step; False if they are there already."""
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    manifest = {
        "schema": 2,
        "made_by": f"trtpipe {__version__}",
        "name": loaded.config.name,
        "rehearsal": loaded.rehearsal,
        "config": loaded.config.model_dump(mode="json"),
        "keys": keys,
        "actions": {name: artifact.manifest["action"] for name, artifact in artifacts.items()},
        "facts": {name: artifact.facts for name, artifact in artifacts.items()},
    }

    visible: list[tuple[Path, tuple[str, ...]]]
    if loaded.converts_only:
        visible = [(workspace.engines_dir, ("convert",))]
    else:
        visible = [
            (workspace.engines_dir, ("build", "verify")),
            (workspace.repositories_dir, ("serve",)),
        ]
    changed = False
    for parent, stages in visible:

        def fill(directory: Path, stages: tuple[str, ...] = stages) -> None:
            for stage in stages:
                link_tree(artifacts[stage].path, directory)

        destination = parent / loaded.config.name
        with workspace.store.lock(f"publish-{parent.name}-{loaded.config.name}", lambda: None):
            if not _is_published(destination, manifest):
                publish(fill, destination, manifest=manifest)
                changed = True
    return changed


def _is_published(destination: Path, expected: dict[str, Any]) -> bool:
    """Whether exactly this is there, down to the modification time of every file."""
    try:
        manifest = json.loads((destination / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if not isinstance(manifest, dict):
        return False
    files = manifest.pop("files", {})
    return manifest == expected and all(
        is_unchanged(destination / name, entry) for name, entry in files.items()
    )
