"""What a stage is: a name, a version, what decides its output, and how to make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import LoadedConfig
from pipeline.errors import Problem
from pipeline.progress import Progress


@dataclass(frozen=True)
class StageContext:
    """What a running stage gets.

    Attributes:
        loaded: the config.
        inputs: role -> directory of the input artifact, read only.
        out_dir: empty directory; becomes the artifact if `run` returns.
        log_path: the stage's log; standard output and error already go there.
        progress: where to report.
        work_dir: where a resumable stage keeps what it has finished; a later run of the same action
            finds it again, and it goes when the artifact is committed. None for other stages.
    """

    loaded: LoadedConfig
    inputs: Mapping[str, Path]
    out_dir: Path
    log_path: Path
    progress: Progress
    work_dir: Path | None = None


class Stage(Protocol):
    """One step of the pipeline. Stages are stateless; all they know comes from the context."""

    @property
    def name(self) -> str:
        """Directory name in the store and word on the screen."""

    @property
    def version(self) -> int:
        """Raised by hand when the output changes for the same input."""

    @property
    def resumable(self) -> bool:
        """Whether the stage continues what a killed run of the same action has left."""

    def finished_parts(self, work_dir: Path) -> str:
        """What a resumable stage has finished there, such as "layers quantized: 2"; "" for nothing."""

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The part of the config that decides the output, as plain data."""

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """Role -> files outside the store that decide the output; they are hashed into the key."""

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Distributions whose version decides the output, e.g. "nvidia-modelopt"."""

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Further distributions that must be installed; their version does not decide the output."""

    def config_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """What the YAML asks of this stage's tools that cannot be."""

    def tool_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """Programs that are missing, which are no distributions."""

    def target_sm(self, loaded: LoadedConfig) -> int | None:
        """Compute capability times ten when the output depends on the GPU."""

    def is_current(self, loaded: LoadedConfig, artifact_dir: Path) -> bool:
        """Whether a stored artifact still stands for what its key says."""

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the artifact into `context.out_dir`; returns facts about it for the manifest."""


class StageDefaults:
    """Answers of a stage that needs nothing special."""

    resumable = False

    def finished_parts(self, work_dir: Path) -> str:
        """Nothing is kept."""
        return ""

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """No external files."""
        return {}

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """No tools."""
        return ()

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """None."""
        return ()

    def config_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """None."""
        return ()

    def tool_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """None."""
        return ()

    def target_sm(self, loaded: LoadedConfig) -> int | None:
        """Independent of the GPU."""
        return None

    def is_current(self, loaded: LoadedConfig, artifact_dir: Path) -> bool:
        """Own files do not change."""
        return True
