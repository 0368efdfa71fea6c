"""What a served model answers, and the errors when it does not: shared by both protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import Problem, StageError, ToolError

START_HINT = "start it with `make serve MODEL=<name>`, or give the address of a running one"


@dataclass(frozen=True)
class Piece:
    """A part of the answer. All but `text` are set in the last piece only."""

    text: str
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None


def piece_from(outputs: dict[str, Any]) -> Piece:
    """A piece from the named outputs of one response."""
    names = ("finish_reason", "num_input_tokens", "num_output_tokens")
    return Piece(text=outputs["text_output"], **{name: outputs.get(name) for name in names})


def is_server_fault(reason: str) -> bool:
    """Whether an error text tells of the server's fault; of the request's otherwise."""
    return reason.startswith(("Stub process", "internal error"))


def not_reachable(url: str, reason: object) -> ToolError:
    """The error for a server that is not there."""
    return ToolError(Problem(url, f"no server answers: {reason}", fix=START_HINT))


def broke_off(url: str, reason: object) -> StageError:
    """The error for an answer that began and did not end."""
    return StageError(
        Problem(url, f"the answer broke off: {reason}", fix="see the server's log, and ask again")
    )
