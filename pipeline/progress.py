"""How long-running code reports progress without knowing who watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress of one stage. Implementations must be cheap: called once per layer or batch."""

    def start(self, total: int, unit: str) -> None:
        """Begin (again) at zero of `total` `unit`s, for example 6 "layers"."""

    def advance(self, note: str = "") -> None:
        """One more unit is done; `note` is shown beside the bar."""

    def say(self, text: str) -> None:
        """One line for the log."""

    def status(self, text: str) -> None:
        """What is being done now, shown beside the bar until something else is."""


class SilentProgress:
    """Progress for callers that do not watch, such as tests."""

    def start(self, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, note: str = "") -> None:
        """Ignore."""

    def say(self, text: str) -> None:
        """Ignore."""

    def status(self, text: str) -> None:
        """Ignore."""
