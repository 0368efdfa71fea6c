"""Config -> Plan: which stages run, on what, and every problem that can be known before they start.

Reads configs and headers only; imports nothing heavy. The same plan is printed by `plan`, executed by
`run` and compared by `explain`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import preflight
from pipeline.config import LoadedConfig
from pipeline.errors import CheckpointError, PlanError, Problem, ToolError
from pipeline.external import HASH_AT_ONCE_BYTES, DigestCache, combined_digest
from pipeline.preflight import Forecast
from pipeline.stages import STAGES, Stage
from pipeline.stages.fetch import local_directory
from pipeline.stages.source_format import SourceFormat, source_format
from pipeline.store import Action, Artifact, Store


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: what runs.
        inputs: role -> name of the step whose artifact it reads.
        action: what decides the output; None while an external input has not been hashed.
        artifact: the finished output if it exists already.
    """

    stage: Stage
    inputs: dict[str, str] = field(default_factory=dict)
    action: Action | None = None
    artifact: Artifact | None = None

    @property
    def status(self) -> str:
        """ "done", "to do", or "unknown" until external files are hashed."""
        if self.artifact is not None:
            return "done"
        return "to do" if self.action is not None else "unknown"


@dataclass(frozen=True)
class Plan:
    """What would happen.

    Attributes:
        steps: in order of execution.
        config_problems, tool_problems, checkpoint_problems: everything that stands in the way.
        forecast: sizes and memory; None when the model's config cannot be read.
        unhashed_bytes: external bytes that `run` will read once to know the keys.
        notes: what is legal, and may surprise.
    """

    loaded: LoadedConfig
    steps: tuple[Step, ...]
    config_problems: tuple[Problem, ...]
    tool_problems: tuple[Problem, ...]
    checkpoint_problems: tuple[Problem, ...]
    forecast: Forecast | None
    unhashed_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All of them; empty means that the build can start."""
        every = (*self.config_problems, *self.tool_problems, *self.checkpoint_problems)
        return tuple(dict.fromkeys(every))

    def raise_problems(self) -> None:
        """Raise all problems at once, if any.

        Raises:
            PlanError: at least one is in the YAML.
            ToolError: none is in the YAML, at least one is a missing tool.
            CheckpointError: all are in the checkpoint.
        """
        if self.config_problems:
            raise PlanError(self.problems)
        if self.tool_problems:
            raise ToolError(self.problems)
        if self.checkpoint_problems:
            raise CheckpointError(self.problems)

    def step(self, name: str) -> Step:
        """The step of that stage."""
        return next(step for step in self.steps if step.stage.name == name)


def stage_graph(loaded: LoadedConfig, source: SourceFormat) -> Iterator[Step]:
    """The stages of a config, in order, and where each takes its input."""
    quantized = loaded.config.quantize.format != "fp16" and not source.quantized
    checkpoint = "quantize" if quantized else "fetch"

    yield Step(STAGES["fetch"])
    if quantized:
        yield Step(STAGES["quantize"], {"source": "fetch"})
    yield Step(STAGES["convert"], {"checkpoint": checkpoint})
    if loaded.converts_only:
        return
    yield Step(STAGES["build"], {"checkpoint": "convert", "source": "fetch"})
    yield Step(STAGES["verify"], {"source": "fetch", "engine": "build"})
    yield Step(STAGES["serve"], {"engine": "build"})


def make_plan(loaded: LoadedConfig, store: Store, digests: DigestCache) -> Plan:
    """Plan a build. Pure but for reading: nothing is written, nothing is downloaded."""
    source_dir = _source_dir(loaded, store, digests)
    source = source_format(loaded, source_dir)
    graph = tuple(stage_graph(loaded, source))
    missing = tuple(_missing_files(loaded, graph))
    files = external_files(loaded, graph)
    unhashed = 0 if missing else digests.unhashed_bytes(files)
    wait_for_hashes = unhashed > HASH_AT_ONCE_BYTES
    steps = tuple(_resolve(loaded, graph, store, None if wait_for_hashes else digests))
    found = preflight.check(loaded, source_dir, source)
    return Plan(
        loaded=loaded,
        steps=steps,
        config_problems=(*missing, *found.config_problems),
        tool_problems=tuple(_missing_tools(loaded, graph)),
        checkpoint_problems=found.checkpoint_problems,
        forecast=found.forecast,
        unhashed_bytes=unhashed if wait_for_hashes else 0,
        notes=found.notes,
    )


def external_files(loaded: LoadedConfig, steps: Iterable[Step]) -> Iterator[Path]:
    """Every file outside the store that decides the output of these steps."""
    for step in steps:
        for paths in step.stage.external_files(loaded).values():
            yield from paths


def _missing_files(loaded: LoadedConfig, graph: Iterable[Step]) -> Iterator[Problem]:
    for step in graph:
        for role, paths in step.stage.external_files(loaded).items():
            for path in paths:
                if not path.is_file():
                    keys = {
                        "calibration": ("quantize", "calibration", "data"),
                        "heldout": ("verify", "data"),
                    }.get(role, ("model",))
                    yield Problem(loaded.where(*keys), f"no such file: {path}", _TEXT_FILES)


def _missing_tools(loaded: LoadedConfig, graph: Iterable[Step]) -> Iterator[Problem]:
    """One problem for each missing distribution, naming the stages that need it."""
    stages: dict[str, list[str]] = {}
    for step in graph:
        for tool in (*step.stage.tools(loaded), *step.stage.needs(loaded)):
            stages.setdefault(tool, []).append(step.stage.name)
    for tool, names in stages.items():
        if _version(tool) is None:
            where = f"stage {', '.join(names)}"
            yield Problem(where, f"{tool} is not installed", fix=_install_hint(tool))


_TEXT_FILES = (
    "`bundled`, or a .txt, .jsonl, .csv or .parquet file; relative paths start at the YAML file"
)
_EXTRAS = {
    "tensorrt_rtx_cu13_bindings": "[rtx]",
    "tensorrt_rtx_cu13_libs": "[rtx]",
    "tritonclient": "[triton]",
    "mpi4py": "[mpi]",
}


def _install_hint(tool: str) -> str:
    if tool == "onnxruntime" and sys.version_info < (3, 11):
        return (
            "use Python 3.11 or newer: no onnxruntime for 3.10 knows the operators of the network"
        )
    return f"pip install 'trtpipe{_EXTRAS.get(tool, '')}', or `make venv` in a clone"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _resolve(
    loaded: LoadedConfig, graph: Iterable[Step], store: Store, digests: DigestCache | None
) -> Iterator[Step]:
    """Give each step its action, its artifact, and the identity that later steps refer to."""
    identities: dict[str, str | None] = {}
    for step in graph:
        action = _action(loaded, step, identities, digests)
        identities[step.stage.name] = None if action is None else action.key
        artifact = None if action is None else store.lookup(action)
        if artifact is not None and not step.stage.is_current(loaded, artifact.path):
            artifact = None
        yield Step(step.stage, step.inputs, action, artifact)


def _action(
    loaded: LoadedConfig,
    step: Step,
    identities: dict[str, str | None],
    digests: DigestCache | None,
) -> Action | None:
    inputs: dict[str, str] = {}
    for role, name in step.inputs.items():
        identity = identities[name]
        if identity is None:
            return None
        inputs[role] = identity
    for role, paths in step.stage.external_files(loaded).items():
        if digests is None or not all(path.is_file() for path in paths):
            return None
        inputs[role] = combined_digest({path.name: digests.digest(path) for path in paths})
    versions = {tool: _version(tool) or "absent" for tool in step.stage.tools(loaded)}
    return Action(
        stage=step.stage.name,
        version=step.stage.version,
        config=step.stage.config_subset(loaded),
        inputs=inputs,
        tools=versions,
        target_sm=step.stage.target_sm(loaded),
    )


def _source_dir(loaded: LoadedConfig, store: Store, digests: DigestCache) -> Path | None:
    """Where config.json and the weights can be read now, without fetching."""
    local = local_directory(loaded)
    if local is not None:
        return local
    action = _action(loaded, Step(STAGES["fetch"]), {}, digests)
    fetched = None if action is None else store.lookup(action)
    return None if fetched is None else fetched.path
