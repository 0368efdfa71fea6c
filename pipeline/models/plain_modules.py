"""Modules that no quantizer is meant to touch: embeddings, the head, the routers of experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.models import ARCHITECTURES


@dataclass(frozen=True)
class PlainModules:
    """By their Hugging Face names; a name may contain {layer}.

    Attributes:
        names: modules with a matrix that stays as it is.
        quantized: the linears, all of which a quantized checkpoint must have quantized.
    """

    names: tuple[str, ...]
    quantized: tuple[str, ...] = ()

    def has(self, module: str) -> bool:
        """Whether a full name is one of `names`."""
        return any(_pattern(name).fullmatch(module) for name in self.names)

    def has_all_with(self, part: str) -> bool:
        """Whether every module whose name contains `part` is one of `names`: AutoAWQ's way to name
        what it leaves alone."""
        found = [name for name in self.names if _pattern(part).search(_numbered(name))]
        missed = [name for name in self.quantized if _pattern(part).search(_numbered(name))]
        return bool(found) and not missed


def plain_modules(config: Mapping[str, Any]) -> PlainModules:
    """Those of a raw config.json's architecture; of one that is not known, what all of them have."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        return PlainModules(("lm_head", "model.embed_tokens"))
    plain: dict[str, None] = {}
    quantized: dict[str, None] = {}
    for rule in architecture.rules:
        for source in rule.sources:
            if rule.quantized:
                quantized[source.name] = None
            elif len(source.axes) > 1:
                plain[source.name] = None
    return PlainModules(tuple(sorted(plain)), tuple(sorted(quantized)))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{layer\}", r"\d+"))


def _numbered(name: str) -> str:
    return name.format(layer=0, expert=0)
