"""Progress on a terminal (bars with the time left) or as plain lines; always on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

from pipeline.errors import PipelineError, Problem
from pipeline.forecast.sizes_text import exact_text
from pipeline.plan import Step
from pipeline.progress import Progress

_PLAIN_INTERVAL_S = 5.0


class PipedConsole(Console):
    """Standard output that may be a pipe whose reader has left: the caller decides what that means."""

    def on_broken_pipe(self) -> None:
        """Rich would end the program with exit code 1."""
        raise BrokenPipeError


def stdout_console() -> Console:
    """Console for results."""
    return PipedConsole(highlight=False)


def stderr_console() -> Console:
    """Console for everything that is not the result."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def print_error(error: PipelineError) -> None:
    """Every problem, on standard error: where and what, then what is allowed, then the fix."""
    console = stderr_console()
    for problem in error.problems:
        _print_problem(console, problem)


def _print_problem(console: Console, problem: Problem) -> None:
    console.print("[bold red]error:[/] ", end="")
    console.print(f"{problem.where}: {problem.what}", markup=False)
    if problem.allowed:
        console.print(f"  allowed: {problem.allowed}", markup=False)
    if problem.fix:
        console.print(f"  fix: {problem.fix}", markup=False)


def seconds_text(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class ConsoleView:
    """Run view for people: a bar per stage on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = stderr_console()
        self._active: _TerminalProgress | None = None

    def stage_hit(self, step: Step) -> None:
        state = "up to date" if step.dropped is None else "not needed"
        self._console.print(f"{step.stage.name:<9} [dim]{state}[/]")

    def stage_starts(self, step: Step) -> Progress:
        if not self._console.is_terminal:
            self._console.print(f"{step.stage.name:<9} starts")
            return _PlainProgress(self._console, step.stage.name)
        self._active = _TerminalProgress(self._console, step.stage.name)
        return self._active

    def stage_done(self, step: Step, seconds: float, facts: dict[str, Any]) -> None:
        self.close()
        self._console.print(
            f"{step.stage.name:<9} [green]done[/] in {seconds_text(seconds)}{_headline(facts)}"
        )

    def say(self, text: str) -> None:
        self.close()
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Take the bar off the screen, also when a stage failed."""
        if self._active is not None:
            self._active.stop()
            self._active = None


def _headline(facts: dict[str, Any]) -> str:
    """Flat facts in one line; nested ones are in the manifest."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, bool | str) or not isinstance(value, int | float):
            continue
        shown = exact_text(value) if name.endswith("bytes") else f"{value:.5g}"
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return f": {', '.join(parts)}" if parts else ""


class _TerminalProgress:
    """One rich bar."""

    def __init__(self, console: Console, name: str) -> None:
        self._rich = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._rich.start()
        self._task: TaskID = self._rich.add_task(name, total=None, unit="", note="")

    def start(self, total: int, unit: str) -> None:
        self._rich.reset(self._task, total=total, unit=unit, note="")

    def advance(self, note: str = "") -> None:
        self._rich.update(self._task, advance=1, note=note)

    def say(self, text: str) -> None:
        self._rich.console.print(f"          {text}", markup=False)

    def status(self, text: str) -> None:
        self._rich.update(self._task, note=text)

    def stop(self) -> None:
        self._rich.stop()


class _PlainProgress:
    """A line every few seconds, with the time left, for logs and pipes."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._total = self._done = 0
        self._unit = ""
        self._started = self._printed = time.monotonic()

    def start(self, total: int, unit: str) -> None:
        self._total, self._done, self._unit = total, 0, unit
        self._started = self._printed = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done += 1
        self._print(note)

    def status(self, text: str) -> None:
        self._print(text)

    def _print(self, note: str) -> None:
        """A line, unless there was one a moment ago."""
        now = time.monotonic()
        if now - self._printed < _PLAIN_INTERVAL_S:
            return
        self._printed = now
        parts = [f"{self._done}/{self._total} {self._unit}"]
        if self._done:
            seconds = (now - self._started) / self._done * (self._total - self._done)
            parts.append(f"{seconds_text(seconds)} left")
        text = "; ".join(filter(None, [", ".join(parts), note]))
        self._console.print(f"{self._name:<9} {text}", markup=False)

    def say(self, text: str) -> None:
        self._console.print(f"          {text}", markup=False)
