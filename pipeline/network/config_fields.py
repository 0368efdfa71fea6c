"""Typed reading of a TensorRT-LLM config.json that collects every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pipeline.errors import CheckpointError, Problem

Value = TypeVar("Value")
_MAX = 3e38  # float32 holds it; JSON has integers of any length, which float() does not take


class ConfigFields:
    """Reads fields; null means absent. Values after a problem are placeholders: call `finish` last."""

    def __init__(
        self, config: Mapping[str, Any], where: str, problems: list[Problem] | None = None
    ) -> None:
        self._config = config
        self._where = where
        self.problems: list[Problem] = [] if problems is None else problems

    def get(self, name: str) -> Any:
        """The raw value; None when it is absent or null."""
        return self._config.get(name)

    @property
    def names(self) -> list[str]:
        """Every field that is there."""
        return list(self._config)

    def refuse(self, what: str, allowed: str = "", fix: str = "") -> None:
        """Record a problem."""
        self.problems.append(Problem(self._where, what, allowed, fix))

    def section(self, name: str) -> ConfigFields:
        """The mapping under `name`; empty when it is absent."""
        fields = self.get(name)
        if fields is not None and not isinstance(fields, dict):
            self.refuse(f"{name} is {fields!r}", "null, a mapping")
            fields = None
        return ConfigFields(fields or {}, f"{self._where}: {name}", self.problems)

    def size(self, name: str, default: int | None = None) -> int:
        """An integer, 1 or more; required without a default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not is_size(value):
            self.refuse(f"{name} is {value!r}", "an integer, 1 or more")
            return 1
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0; required without a default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not _is_positive(value):
            self.refuse(f"{name} is {value!r}", "a number above 0")
            return 1.0
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A number above 0, or None when it is absent."""
        return None if self.get(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        values = self.get(name)
        if (
            not isinstance(values, list)
            or len(values) != count
            or not all(map(_is_positive, values))
        ):
            shown = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            self.refuse(f"{name} is {shown}", f"a list of {count} numbers above 0")
            return (1.0,) * count
        return tuple(float(value) for value in values)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        return self.choice(name, {False: False, True: True}, default)

    def choice(self, name: str, allowed: Mapping[Any, Value], default: Any) -> Value:
        """What `allowed` makes of the value; an absent field counts as `default`."""
        value = self.get(name)
        value = default if value is None else value
        # A list is no key, and 1 is no true.
        is_bool = isinstance(value, bool)
        known = [key for key in allowed if key == value and isinstance(key, bool) == is_bool]
        if not known:
            self.refuse(f"{name} is {value!r}", ", ".join(map(_shown, allowed)))
            return next(iter(allowed.values()))
        return allowed[known[0]]

    def only(self, name: str, allowed: Sequence[object]) -> None:
        """Refuse every other value; an absent field counts as the first."""
        self.choice(name, dict.fromkeys(allowed), allowed[0])

    def finish(self) -> None:
        """Raises CheckpointError with everything that was refused."""
        if self.problems:
            raise CheckpointError(self.problems)


def is_size(value: object) -> bool:
    """Whether a JSON value is an integer, 1 or more (true is not a number)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
