"""Errors for users: where, what, what is allowed, how to fix it; and the exit code of each kind.

`assert` is for bugs of this program; everything a user can cause raises a `PipelineError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of every command, part of the public contract."""

    DONE = 0
    CONFIG = 2  # bad config or impossible plan
    CHECKPOINT = 3  # bad checkpoint
    TOOL = 4  # missing tool, port, network
    STAGE = 5  # a stage failed
    GATE = 6  # integrity or quality gate
    INTERRUPTED = 130  # Ctrl-C, as shells report it


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: file and line, tensor, rank or stage; what a user would open or search for.
        what: the fact, with the offending value.
        allowed: the allowed set or range; empty when it is obvious from `what`.
        fix: the next thing to do; empty when `allowed` already says it.
    """

    where: str
    what: str
    allowed: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.fix:
            text += f"; fix: {self.fix}"
        return text


class PipelineError(Exception):
    """Base of every error that a user can cause. Carries one or more problems, all of them listed."""

    exit_code: ExitCode = ExitCode.STAGE

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        listed = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert listed, "an error without a problem tells nobody anything"
        self.problems: tuple[Problem, ...] = listed
        super().__init__("\n".join(str(problem) for problem in listed))


class ConfigError(PipelineError):
    """The YAML is wrong."""

    exit_code = ExitCode.CONFIG


class PlanError(PipelineError):
    """The YAML is right but what it asks for cannot be done."""

    exit_code = ExitCode.CONFIG


class CheckpointError(PipelineError):
    """The weights, the tokenizer or their config are missing, corrupt or of an unknown kind."""

    exit_code = ExitCode.CHECKPOINT


class ToolError(PipelineError):
    """A program, library, port or network that is needed is not there."""

    exit_code = ExitCode.TOOL


class StageError(PipelineError):
    """A stage started and failed."""

    exit_code = ExitCode.STAGE


class GateError(PipelineError):
    """An artifact is not what it should be: integrity or quality."""

    exit_code = ExitCode.GATE


class RequestError(PipelineError):
    """A generation request is wrong: empty or too long prompt, a parameter out of range."""

    exit_code = ExitCode.CONFIG


def error_to_json(error: PipelineError) -> dict[str, Any]:
    """Plain data of an error, to hand it from a child process to its parent."""
    problems = [vars(problem) for problem in error.problems]
    return {"error": type(error).__name__, "problems": problems}


def error_from_json(data: dict[str, Any]) -> PipelineError:
    """The inverse of `error_to_json`."""
    kinds = {kind.__name__: kind for kind in PipelineError.__subclasses__()}
    return kinds[data["error"]](Problem(**problem) for problem in data["problems"])
