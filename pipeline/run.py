"""Executes a plan: hits, misses, locks, one child process per stage, publishing."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline import __version__
from pipeline.config import LoadedConfig
from pipeline.disk import write_problem
from pipeline.errors import PipelineError, PlanError, Problem, StageError
from pipeline.explain import changed_fields
from pipeline.external import DigestCache
from pipeline.identity import Identity, identity_of
from pipeline.keeping import Keeper
from pipeline.launch import started_too_often
from pipeline.manifest import SCHEMA
from pipeline.plan import Plan, Step, external_files, make_plan
from pipeline.progress import Progress
from pipeline.publish import link_tree, publish
from pipeline.stage_process import run_stage
from pipeline.stages.build import build_limits
from pipeline.store import LOG, MANIFEST, Action, Artifact, file_sha256, is_unchanged
from pipeline.workspace import Workspace

_EVIDENCE = ("*.log", "report.*")
"""What is kept of a stage that failed."""


class RunView(Protocol):
    """Who watches a run: a terminal, plain lines, or nobody."""

    def stage_hit(self, step: Step) -> None:
        """The artifact exists, or was dropped and is not needed."""

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
        PlanError, ToolError, CheckpointError: the plan has problems; nothing was started. PlanError
            also when mpirun has started this program several times.
        StageError: a directory cannot be written; nothing was started.
        PipelineError: a stage failed; nothing was published, its log is kept under failed/.
    """
    _refuse_many_starts()
    digests = workspace.digests()
    plan = _plan_with_keys(loaded, workspace, digests, view)
    if loaded.rehearsal_note:
        view.say(loaded.rehearsal_note)
    workspace.store.remove_dead_work()
    with Keeper(loaded, workspace, view.say) as keeper:
        maker = _Maker(loaded, workspace, digests, view)
        steps = keeper.hold(plan.steps)
        maker.make(steps[0])
        if maker.executed:
            # Now the weights can be checked, before hours go by; they may be quantized already, too.
            plan = make_plan(loaded, workspace.store, digests)
            plan.raise_problems()
            steps = keeper.hold(plan.steps)
        for index, step in enumerate(steps):
            if index > 0:
                maker.make(step)
            keeper.let_go(steps[: index + 1], steps[index + 1 :])
        published = _publish(loaded, workspace, maker.artifacts)
    for path in _changed_configs(loaded):
        view.say(
            f"{path} was changed while this run was under way: what was made is what it said at the "
            "start; run again for the rest"
        )
    return RunResult(
        engine_dir=workspace.engines_dir / loaded.config.name,
        repository_dir=(
            workspace.repositories_dir / loaded.config.name if "serve" in maker.artifacts else None
        ),
        artifacts=maker.artifacts,
        executed=tuple(maker.executed),
        published=published,
    )


def _changed_configs(loaded: LoadedConfig) -> Iterator[str]:
    """The YAML, or one that it extends, whose bytes are no more what this run has read."""
    for path, sha256 in loaded.files.items():
        try:
            is_same = file_sha256(Path(path)) == sha256
        except OSError:  # gone
            is_same = False
        if not is_same:
            yield path


def _refuse_many_starts() -> None:
    """One run starts one process for each rank; as many runs would wait for each other's locks."""
    problem = started_too_often()
    if problem is not None:
        raise PlanError(problem)


def _plan_with_keys(
    loaded: LoadedConfig, workspace: Workspace, digests: DigestCache, view: RunView
) -> Plan:
    """Plan; read large external files once if that is what it takes to know the keys."""
    plan = make_plan(loaded, workspace.store, digests)
    plan.raise_problems()
    _refuse_unwritable(plan, workspace)
    if plan.unhashed_bytes:
        view.say(f"hashing {plan.unhashed_bytes / 1e9:.1f} GB of the original checkpoint, once")
        for path in external_files(loaded, plan.steps):
            digests.digest(path)
        plan = make_plan(loaded, workspace.store, digests)
    digests.save()
    return plan


def _refuse_unwritable(plan: Plan, workspace: Workspace) -> None:
    """Say before hours go by that the result could not be written."""
    found = [write_problem(workspace.engines_dir) or write_problem(workspace.store.root)]
    if any(step.stage.name == "serve" for step in plan.steps):
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
        self._dropped: set[str] = set()

    def make(self, step: Step) -> None:
        """Take the artifact from the store, or run the stage under the lock of its key."""
        name, action = step.stage.name, step.action
        assert action is not None
        self._read += external_files(self._loaded, [step])
        if step.dropped is not None:
            self.artifacts[name] = step.dropped
            self._dropped.add(name)
            self._view.stage_hit(step)
            return
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
        if not self._dropped.isdisjoint(step.inputs.values()):
            what = "what was made of it before was changed or removed while this run was under way"
            raise StageError(Problem(f"stage {name}", what, fix="run again"))
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
        "schema": SCHEMA,
        "made_by": f"trtpipe {__version__}",
        "name": loaded.config.name,
        "rehearsal": loaded.rehearsal,
        "config": loaded.config.model_dump(mode="json"),
        "keys": keys,
        "actions": {name: artifact.manifest["action"] for name, artifact in artifacts.items()},
        "facts": {name: artifact.facts for name, artifact in artifacts.items()},
        "identity": _identity(loaded, artifacts).model_dump(mode="json"),
    }

    main = ("build", "verify") if "build" in artifacts else ("convert",)
    shown = tuple(stage for stage in (*main, "kit") if stage in artifacts)
    visible = [(workspace.engines_dir, shown)]
    if "serve" in artifacts:
        visible.append((workspace.repositories_dir, ("serve",)))
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


def _identity(loaded: LoadedConfig, artifacts: dict[str, Artifact]) -> Identity:
    """What the engine, or the checkpoint that the build ends with, is and needs."""
    has_engine = "build" in artifacts
    ranks = artifacts["build" if has_engine else "convert"]
    return identity_of(
        loaded.config,
        {name: artifact.manifest["action"] for name, artifact in artifacts.items()},
        artifacts["convert"].key,
        ranks.facts if has_engine else None,
        asdict(build_limits(loaded)),
        ranks.manifest["files"],
    )


def _is_published(destination: Path, expected: dict[str, Any]) -> bool:
    """Whether exactly this is there, down to the modification time of every file."""
    try:
        manifest = json.loads((destination / MANIFEST).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if not isinstance(manifest, dict):
        return False
    files = manifest.pop("files", {})
    manifest.pop("digest", None)
    return manifest == expected and all(
        is_unchanged(destination / name, entry) for name, entry in files.items()
    )
