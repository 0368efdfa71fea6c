"""Which versions of TensorRT-LLM still build engines from a checkpoint, and read ours.

The flow from a checkpoint through trtllm-build to an engine was deprecated in the line of 1.3.0rc and
removed in July 2026, from 1.3.0rc21 on (pull requests 15918 and 16369 of NVIDIA/TensorRT-LLM).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pipeline.errors import Problem

PINNED: Final = "1.2.1"
"""The last release with the flow; facts about flags are those of its line."""
ALLOWED: Final = "0.17 up to, not including, 1.3"
_OLDEST, _FIRST_EVEN_STAGES, _DEPRECATED = (0, 17), (1, 0), (1, 3)
_LAST_CANDIDATE = 20
_LAST_ON_PYPI = 15
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?(?:[.+-]?(?:post|dev).*|\+.*)?")


@dataclass(frozen=True)
class Version:
    """A version of TensorRT-LLM: major and minor number, patch, release candidate or None."""

    minor: tuple[int, int]
    patch: int
    candidate: int | None

    @classmethod
    def parse(cls, text: str) -> Version | None:
        """None for what is no version, such as the tag of an image of one's own."""
        found = _VERSION.fullmatch(text.strip())
        if found is None:
            return None
        major, minor, patch, candidate = (int(part) if part else None for part in found.groups())
        assert major is not None
        assert minor is not None
        return cls((major, minor), patch or 0, candidate)


def version_problem(text: str, where: str) -> Problem | None:
    """None, or why this version cannot build engines from our checkpoints."""
    version = Version.parse(text)
    what = f"TensorRT-LLM {text}"
    fix = f"use {PINNED}"
    if version is None:
        return Problem(where, f"{what}: no version that is known", ALLOWED, fix)
    if version.minor < _OLDEST:
        reason = "is older than 0.17, whose checkpoint layout and flags this program writes"
        return Problem(where, f"{what} {reason}", ALLOWED, fix)
    candidate = version.candidate if version.patch == 0 else None
    if version.minor < _DEPRECATED:
        return None
    if version.minor == _DEPRECATED and candidate is not None and candidate <= _LAST_CANDIDATE:
        return None
    reason = "has no trtllm-build for checkpoints any more: removed in July 2026, from 1.3.0rc21 on"
    return Problem(where, f"{what} {reason}", ALLOWED, fix)


def version_note(text: str) -> str | None:
    """What is worth knowing of a version that is taken."""
    version = Version.parse(text)
    if version is None or version.minor != _DEPRECATED or version.candidate is None:
        return None
    source = "" if version.candidate <= _LAST_ON_PYPI else ", and this candidate was never on PyPI"
    return (
        f"TensorRT-LLM {text}: trtllm-build is deprecated there{source}; {PINNED} is what is known"
    )


def stages_problem(text: str, num_layers: int, pp: int, where: str) -> Problem | None:
    """None, or why this version cuts the layers otherwise than our checkpoints do."""
    version = Version.parse(text)
    if version is None or version.minor >= _FIRST_EVEN_STAGES or num_layers % pp == 0:
        return None
    what = (
        f"TensorRT-LLM {text} drops the last {num_layers % pp} of {num_layers} layers with pp {pp}: "
        "before 1.0 every stage has the same number"
    )
    return Problem(where, what, fix=f"use {PINNED}, or a pp that divides {num_layers}")
