"""What kind of text it is, by its characters alone: scripts, and how often which character occurs.

No language model. Scripts tell Russian from English; the frequencies of characters tell prose from
program code, and German from English when there is enough of both.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_OTHER_NAMES: Final = {"CJK": "Han", "IDEOGRAPHIC": "Han", "BOPOMOFO": "Bopomofo"}
_WIDTHS: Final = ("FULLWIDTH", "HALFWIDTH")
_NO_SCRIPT: Final = frozenset({"MATHEMATICAL", "MODIFIER", "MICRO", "FEMININE", "MASCULINE"})

MIN_CHARS: Final = 500
"""With fewer characters than this, the scripts of two texts are not compared."""

MIN_CHARS_OF_KIND: Final = 16_000
"""With fewer, the frequencies of their characters are not compared."""


@dataclass(frozen=True)
class Profile:
    """Characters of a text.

    Attributes:
        counts: character, folded to lower case -> how often.
    """

    counts: Counter[str]

    @property
    def num_chars(self) -> int:
        """Characters of the text."""
        return self.counts.total()

    def scripts(self) -> dict[str, float]:
        """Script -> share of the letters, largest first; empty for a text without letters.

        By the first word of each letter's Unicode name, which is what the standard library knows.
        """
        letters: Counter[str] = Counter()
        for character, count in self.counts.items():
            if (script := _script(character)) is not None:
                letters[script] += count
        total = letters.total()
        return {script: count / total for script, count in letters.most_common()}

    def kinds(self) -> dict[str, float]:
        """Share of letters, digits, white space and everything else."""
        kinds = dict.fromkeys(("letters", "digits", "whitespace", "other"), 0)
        for character, count in self.counts.items():
            kinds[_kind(character)] += count
        return {kind: count / max(1, self.num_chars) for kind, count in kinds.items()}


def profile(texts: Iterable[str]) -> Profile:
    """The profile of all texts together."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.lower())
    return Profile(counts)


@functools.cache
def _script(character: str) -> str | None:
    if not character.isalpha():
        return None
    words = unicodedata.name(character, "UNNAMED").split()
    word = words[1] if words[0] in _WIDTHS and len(words) > 1 else words[0].partition("-")[0]
    if word in _NO_SCRIPT:
        return None
    return _OTHER_NAMES.get(word, word.capitalize())


def _kind(character: str) -> str:
    if character.isalpha():
        return "letters"
    if character.isspace():
        return "whitespace"
    return "digits" if character.isdigit() else "other"


def script_distance(one: Profile, other: Profile) -> float:
    """Share of letters that would have to change their script, 0 to 1."""
    left, right = one.scripts(), other.scripts()
    return sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in {*left, *right}) / 2


def character_distance(one: Profile, other: Profile) -> float:
    """Jensen-Shannon divergence in bits of the frequencies of characters, 0 to 1.

    All digits count as one character, all white space as another: tables and indentation differ from
    file to file of the same kind.
    """
    left, right = _frequencies(one), _frequencies(other)
    total = 0.0
    for key in {*left, *right}:
        p, q = left.get(key, 0.0), right.get(key, 0.0)
        for share in (p, q):
            if share:
                total += share / 2 * math.log2(2 * share / (p + q))
    return total


def _frequencies(one: Profile) -> dict[str, float]:
    folded: Counter[str] = Counter()
    for character, count in one.counts.items():
        kind = _kind(character)
        folded[kind if kind in ("digits", "whitespace") else character] += count
    return {key: count / folded.total() for key, count in folded.items()}
