"""Typed reading of a raw config.json that collects every problem instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import CheckpointError, Problem

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
MAX_NUMBER = 3e38
POSITIVE = f"a number above 0, at most {MAX_NUMBER:.0e}: float32 holds it"
_SHOWN_CHARACTERS = 60


class HfFields:
    """Reads fields of a raw config.json. Values after a problem are placeholders: call `finish` last."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.problems: list[Problem] = []

    def get(self, name: str) -> Any:
        """The raw value; None when it is absent or null."""
        return self._config.get(name)

    def refuse(self, name: str, what: str, allowed: str = "", fix: str = "") -> None:
        """Records a problem with one field."""
        self.problems.append(Problem(f"config.json: {name}", what, allowed, fix))

    def size(self, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
        """An integer from 1 to `limit`, which keeps a corrupt config from planning for ever."""
        value = self.get(name)
        allowed = f"an integer from 1 to {limit}"
        if value is None:
            if default is not None:
                return default
            self.refuse(name, "missing", allowed)
            return 1
        if not is_size(value, limit):
            self.refuse(name, shown(value), allowed)
            return 1
        return int(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.get(name)
        if value is None:
            if default is not None:
                return default
            self.refuse(name, "missing", POSITIVE)
            return 1.0
        if not is_positive_number(value):
            self.refuse(name, shown(value), POSITIVE)
            return 1.0
        return float(value)

    def optional_positive(self, name: str, default: float) -> float | None:
        """A number above zero, or None where null says so; a missing field means `default`."""
        if name in self._config and self.get(name) is None:
            return None
        return self.positive(name, default)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self.get(name)
        if value is None:
            return default
        if value not in allowed:
            self.refuse(name, f"{value!r} is not supported", ", ".join(allowed))
            return default
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"{value!r}", "true, false")
            return default
        return value

    def only(self, name: str, allowed: object, default: object, why: str) -> None:
        """Refuses every value but `allowed`; a missing field means `default`."""
        value = self.get(name)
        if (default if value is None else value) != allowed:
            self.refuse(name, f"{value!r} is not supported: {why}", repr(allowed))

    def finish(self) -> None:
        """Raises CheckpointError with everything that was refused."""
        if self.problems:
            raise CheckpointError(self.problems)


def is_size(value: object, limit: int = MAX_SIZE) -> bool:
    """Whether a JSON value is an integer from 1 to `limit` (true and 1.0 are not)."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def is_positive_number(value: object) -> bool:
    """Whether a JSON value is a number above zero that float32 holds (true is not a number).

    JSON has integers of any length, which float() does not take.
    """
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER
    )


def shown(value: object) -> str:
    """A value for a message, its middle left out when it is long."""
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}...{text[-half:]}"
