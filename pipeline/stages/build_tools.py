"""Whether this machine has what the YAML's backend builds with; where not, a build ends with a kit."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from pipeline.build_config import BackendName
from pipeline.config import LoadedConfig
from pipeline.engine.trtllm_environment import HostTool, ImageTool, Tool, described, find_tool
from pipeline.engine.trtllm_flags import BuildSubject, flag_notes, flag_problems
from pipeline.engine.trtllm_version import (
    Version,
    stages_problem,
    version_note,
    version_problem,
)
from pipeline.errors import Problem, ToolError
from pipeline.models import ModelShape
from pipeline.nvidia_host import NvidiaHost, nvidia_host
from pipeline.quant.backends import TENSORRT, TENSORRT_LLM
from pipeline.quant.formats import MIXED, QuantFormat
from pipeline.targets import TARGETS

_ENVIRONMENT = ("build", "tensorrt_llm", "environment")


def kit_reason(loaded: LoadedConfig) -> str | None:
    """Why the run ends with a build kit, such as "no GPU is here"; None where engines can be built."""
    backend = loaded.config.build.backend
    if backend == TENSORRT:
        if importlib.util.find_spec("tensorrt") is None:
            return "tensorrt is not installed here"
        return _no_gpu()
    if backend == TENSORRT_LLM:
        if trtllm_tool(loaded) is None:
            return described(loaded.config.build.tensorrt_llm.environment)
        return _no_gpu()
    return None


def trtllm_tool(loaded: LoadedConfig) -> Tool | None:
    """trtllm-build of the environment that the YAML names; None if it is not here."""
    environment = loaded.config.build.tensorrt_llm.environment
    return find_tool(environment, lambda path: loaded.resolve(path, *_ENVIRONMENT))


def trtllm_version(loaded: LoadedConfig) -> str | None:
    """Version of that tool; of an image, what its tag says. None if it is not known before it runs.

    Raises:
        ToolError: its interpreter cannot say.
    """
    tool = trtllm_tool(loaded)
    if isinstance(tool, ImageTool):
        return tool.tag if Version.parse(tool.tag) is not None else None
    return None if tool is None else _host_version(tool)


def tool_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """What is here but cannot be used: another GPU, a version without the flow."""
    if kit_reason(loaded) is not None or loaded.config.build.backend not in (
        TENSORRT,
        TENSORRT_LLM,
    ):
        return
    target = TARGETS[loaded.config.target]
    host = _host()
    if target.sm not in [gpu.sm for gpu in host.gpus]:
        found = ", ".join(f"{gpu.name} (SM{gpu.sm})" for gpu in host.gpus)
        what = f"{target.name} is SM{target.sm}, here is {found}"
        fix = "engines are built on the GPU that they are for: build there"
        yield Problem(loaded.where("target"), what, fix=fix)
    if loaded.config.build.backend == TENSORRT_LLM:
        try:
            version = trtllm_version(loaded)
        except ToolError as error:
            yield from error.problems
            return
        if version is not None:
            refused = version_problem(version, loaded.where(*_ENVIRONMENT))
            if refused is not None:
                yield refused


def trtllm_subject(loaded: LoadedConfig, shape: ModelShape, fmt: QuantFormat) -> BuildSubject:
    """What flags depend on, before there is a checkpoint."""
    config = loaded.config
    return BuildSubject(
        build=config.build,
        sm=TARGETS[config.target].sm,
        format=MIXED if fmt.is_mixed else fmt.name,
        parts=tuple(part.name for part in fmt.parts),
        kv_cache=fmt.kv_cache,
        tp=config.mapping.tp,
        world_size=config.mapping.world_size,
        architecture=shape.architecture,
    )


def trtllm_problems(
    loaded: LoadedConfig, subject: BuildSubject, num_layers: int
) -> Iterator[Problem]:
    """Flags that do not go together, at their lines of the YAML."""
    for problem in flag_problems(subject):
        yield replace(problem, where=loaded.where("build", "tensorrt_llm", problem.where))
    version = known_version(loaded)
    if version is not None:
        pp = loaded.config.mapping.pp
        refused = stages_problem(version, num_layers, pp, loaded.where("mapping", "pp"))
        if refused is not None:
            yield refused


def trtllm_notes(loaded: LoadedConfig, subject: BuildSubject) -> Iterator[str]:
    """What flags and version bring along."""
    yield from flag_notes(subject)
    version = known_version(loaded)
    note = None if version is None else version_note(version)
    if note is not None:
        yield note


def kit_note(loaded: LoadedConfig) -> str | None:
    """What the plan says of a build that ends with a kit."""
    reason = kit_reason(loaded)
    return None if reason is None else f"{reason}: the run ends with a build kit"


def known_version(loaded: LoadedConfig) -> str | None:
    """`trtllm_version`, or None where it fails."""
    try:
        return trtllm_version(loaded)
    except ToolError:  # `tool_problems` has it
        return None


def effective_backend(loaded: LoadedConfig) -> BackendName:
    """What the build stage makes here: of a network that is compiled elsewhere, the CPU's engine."""
    backend = loaded.config.build.backend
    if backend == TENSORRT and kit_reason(loaded) is not None:
        return "onnxruntime"
    return backend


def _no_gpu() -> str | None:
    host = _host()
    if host.gpus:
        return None
    return host.failure or "no GPU is here"


def _host() -> NvidiaHost:
    return _host_of(shutil.which("nvidia-smi"))


@cache
def _host_of(smi: str | None) -> NvidiaHost:
    """A machine's GPUs stay while a program runs."""
    return nvidia_host(smi=smi)


@cache
def _host_version(tool: HostTool) -> str:
    return tool.version()
