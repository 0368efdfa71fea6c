"""A run view that remembers."""

from __future__ import annotations

from typing import Any

from pipeline.plan import Step
from pipeline.progress import Progress, SilentProgress


class Recorder:
    """Stages that were there already, and every line."""

    def __init__(self) -> None:
        self.hits: list[str] = []
        self.lines: list[str] = []

    def stage_hit(self, step: Step) -> None:
        self.hits.append(step.stage.name)

    def stage_starts(self, step: Step) -> Progress:
        return SilentProgress()

    def stage_done(self, step: Step, seconds: float, facts: dict[str, Any]) -> None:
        """Not needed."""

    def say(self, text: str) -> None:
        self.lines.append(text)
