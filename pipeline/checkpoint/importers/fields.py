"""Fields of a `quantization_config`, with every one that cannot be read listed at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import CheckpointError, Problem
from pipeline.models.plain_modules import PlainModules
from pipeline.quant.formats import GROUP_SIZES

LEFT_ALONE = ("lm_head", "model.embed_tokens")
"""What every quantizer leaves alone."""


class QuantFields:
    """Looks fields up and collects problems; `finish` raises them."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self._fields = fields
        self._where = where
        self._problems: list[Problem] = []

    def refuse(self, what: str, allowed: str = "", fix: str = "") -> None:
        """One more problem."""
        self._problems.append(Problem(self._where, what, allowed, fix))

    def only(self, name: str, value: object, reason: str = "") -> None:
        """The field must have this value; a missing one has it."""
        found = self._fields.get(name, value)
        if found != value or type(found) is not type(value):
            what = f"{name} {found!r}" + (f": {reason}" if reason else "")
            self.refuse(what, repr(value))

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            self.refuse(f"{name} {value!r}", "true, false")
            return default
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """One of `choices`: value -> why it cannot be read, empty if it can. Case does not count."""
        value = self._fields.get(name, default)
        known = [choice for choice, reason in choices.items() if not reason]
        text = str(value).lower()
        if not isinstance(value, str) or choices.get(text, "unknown"):
            reason = choices.get(text, "")
            self.refuse(f"{name} {value!r}" + (f": {reason}" if reason else ""), ", ".join(known))
            return default
        return text

    def group_size(self, name: str = "group_size") -> int:
        """Consecutive input features that share a scale."""
        value = self._fields.get(name)
        if isinstance(value, bool) or value not in GROUP_SIZES:
            self.refuse(f"{name} {value!r}", ", ".join(map(str, GROUP_SIZES)))
            return GROUP_SIZES[0]
        return int(value)

    def left_alone(self, name: str, plain: PlainModules) -> None:
        """The field that lists parts of the names of modules which are not quantized.

        Linears among them would mean that layers differ, which no table describes.
        """
        value = self._fields.get(name)
        names = value if isinstance(value, list) else [value] if value else []
        others = [str(module) for module in names if not plain.has_all_with(str(module))]
        if others:
            what = f"{name} leaves layers unquantized: {', '.join(others)}"
            self.refuse(what, ", ".join(plain.names))

    def finish(self) -> None:
        """Raises CheckpointError if anything was refused."""
        if self._problems:
            raise CheckpointError(self._problems)
