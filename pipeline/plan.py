"""Config -> Plan: which stages run, on what, and every problem that can be known before they start.

Reads configs and headers only; imports nothing heavy. The same plan is printed by `plan`, executed by
`run` and compared by `explain`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline import preflight
from pipeline.config import LoadedConfig
from pipeline.errors import CheckpointError, PlanError, Problem, ToolError
from pipeline.external import HASH_AT_ONCE_BYTES, DigestCache, combined_digest
from pipeline.forecast.changes import Change
from pipeline.forecast.from_config import Forecast, host_forecast
from pipeline.forecast.judgement import HostForecast, host_notes, host_problems
from pipeline.forecast.machine import Machine, this_machine
from pipeline.stages import STAGES, Stage
from pipeline.stages.build_tools import kit_note, kit_reason
from pipeline.stages.fetch import local_directory
from pipeline.stages.launching import max_memory_bytes
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
        dropped: what is left of it if it was dropped and no step that has to be made reads it.
    """

    stage: Stage
    inputs: dict[str, str] = field(default_factory=dict)
    action: Action | None = None
    artifact: Artifact | None = None
    dropped: Artifact | None = None

    @property
    def status(self) -> str:
        """ "done", "not needed", "to do", or "unknown" until external files are hashed."""
        if self.artifact is not None:
            return "done"
        if self.dropped is not None:
            return "not needed"
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
        changes: the nearest builds that are possible, where this one is not.
        host: what the run takes on this machine; None when the sizes are not known.
        host_problems: what this machine is too small for.
    """

    loaded: LoadedConfig
    steps: tuple[Step, ...]
    config_problems: tuple[Problem, ...]
    tool_problems: tuple[Problem, ...]
    checkpoint_problems: tuple[Problem, ...]
    forecast: Forecast | None
    unhashed_bytes: int
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    host: HostForecast | None = None
    host_problems: tuple[Problem, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All of them; empty means that the build can start."""
        every = (
            *self.config_problems,
            *self.host_problems,
            *self.tool_problems,
            *self.checkpoint_problems,
        )
        return tuple(dict.fromkeys(every))

    def raise_problems(self) -> None:
        """Raise all problems at once, if any.

        Raises:
            PlanError: at least one is in the YAML, or this machine is too small.
            ToolError: none of those, at least one is a missing tool.
            CheckpointError: all are in the checkpoint.
        """
        if self.config_problems or self.host_problems:
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
    needs_kit = kit_reason(loaded) is not None
    if loaded.has_network or not needs_kit:
        yield Step(STAGES["build"], {"checkpoint": "convert", "source": "fetch"})
    if loaded.has_network:
        yield Step(STAGES["verify"], {"source": "fetch", "engine": "build"})
        if (
            not needs_kit and loaded.config.mapping.world_size == 1
        ):  # the CPU runtime serves one rank
            yield Step(STAGES["serve"], {"engine": "build"})
    if needs_kit:
        engine = {"engine": "build"} if loaded.has_network else {}
        yield Step(STAGES["kit"], {"checkpoint": "convert", "source": "fetch", **engine})


def published_stages(stages: Iterable[str]) -> set[str]:
    """Which stages of a build are its result: their artifacts stay in the store."""
    names = set(stages)
    return names - {"fetch", "quantize"} - ({"convert"} if "build" in names else set())


def make_plan(
    loaded: LoadedConfig, store: Store, digests: DigestCache, machine: Machine | None = None
) -> Plan:
    """Plan a build. Pure but for reading: nothing is written, nothing is downloaded.

    Args:
        machine: that the build is to run on; None: this one, with what is free now.
    """
    source_dir = _source_dir(loaded, store, digests)
    source = source_format(loaded, source_dir)
    graph = tuple(stage_graph(loaded, source))
    missing = tuple(_missing_files(loaded, graph))
    files = external_files(loaded, graph)
    unhashed = 0 if missing else digests.unhashed_bytes(files)
    wait_for_hashes = unhashed > HASH_AT_ONCE_BYTES
    resolved = _with_actions(loaded, graph, None if wait_for_hashes else digests)
    steps = look_up(loaded, tuple(resolved), store)
    found = preflight.check(loaded, source_dir, source)
    host = None
    if found.forecast is not None:
        host = _host(loaded, found.forecast, steps, machine or this_machine(store.root))
    return Plan(
        loaded=loaded,
        steps=steps,
        config_problems=(*missing, *_stage_problems(loaded, graph), *found.config_problems),
        tool_problems=tuple(_missing_tools(loaded, graph)),
        checkpoint_problems=found.checkpoint_problems,
        forecast=found.forecast,
        unhashed_bytes=unhashed if wait_for_hashes else 0,
        notes=(
            *filter(None, [loaded.rehearsal_note, kit_note(loaded)]),
            *found.notes,
            *(host_notes(host, max_memory_bytes(loaded)) if host is not None else ()),
        ),
        changes=found.changes,
        host=host,
        host_problems=tuple(host_problems(host)) if host is not None else (),
    )


def _host(
    loaded: LoadedConfig, found: Forecast, steps: Iterable[Step], machine: Machine
) -> HostForecast:
    """Of the steps that would run."""
    waiting = tuple(
        (step.stage.name, tuple(step.inputs.values()))
        for step in steps
        if step.status in ("to do", "unknown")
    )
    published = published_stages(step.stage.name for step in steps)
    return host_forecast(loaded, found, waiting, published, machine)


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


def _stage_problems(loaded: LoadedConfig, graph: Iterable[Step]) -> Iterator[Problem]:
    for step in graph:
        yield from step.stage.config_problems(loaded)


def _missing_tools(loaded: LoadedConfig, graph: Iterable[Step]) -> Iterator[Problem]:
    """One problem for each missing distribution, naming the stages that need it; and programs."""
    stages: dict[str, list[str]] = {}
    for step in graph:
        for tool in (*step.stage.tools(loaded), *step.stage.needs(loaded)):
            stages.setdefault(tool, []).append(step.stage.name)
    for tool, names in stages.items():
        if _version(tool) is None:
            where = f"stage {', '.join(names)}"
            yield Problem(where, f"{tool} is not installed", fix=_install_hint(tool))
    for step in graph:
        yield from step.stage.tool_problems(loaded)


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


def _with_actions(
    loaded: LoadedConfig, graph: Iterable[Step], digests: DigestCache | None
) -> Iterator[Step]:
    """Give each step its action, whose key is the identity that later steps refer to."""
    identities: dict[str, str | None] = {}
    for step in graph:
        action = _action(loaded, step, identities, digests)
        identities[step.stage.name] = None if action is None else action.key
        yield replace(step, action=action)


def look_up(loaded: LoadedConfig, steps: Sequence[Step], store: Store) -> tuple[Step, ...]:
    """The same steps with what the store has of them now.

    An artifact that was dropped has to be made again only where it is published, or read by a step that
    has to be made.
    """
    found: list[Step] = []
    read = published_stages(step.stage.name for step in steps)
    for step in reversed(steps):
        artifact, dropped = _stored(loaded, step, store), None
        if artifact is None and step.action is not None and step.stage.name not in read:
            dropped = store.dropped(step.action)
        if artifact is None and dropped is None:
            read.update(step.inputs.values())
        found.append(replace(step, artifact=artifact, dropped=dropped))
    return tuple(reversed(found))


def _stored(loaded: LoadedConfig, step: Step, store: Store) -> Artifact | None:
    artifact = None if step.action is None else store.lookup(step.action)
    if artifact is None or not step.stage.is_current(loaded, artifact.path):
        return None
    return artifact


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
