"""What is taken out of documents before any is chosen: each step by itself, off by default."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from pipeline.calibration_config import CleanConfig
from pipeline.quant.data.documents import Document, Message

_URL: Final = re.compile(r"""\b(?:(?:https?|ftp)://|www\.)[^\s<>"]*[^\s<>".,;:!?'()\[\]{}]""")
_BLANKS: Final = re.compile(r"[^\S\n]+")
_BLANKS_AT_LINE_END: Final = re.compile(r" +(?=\n)|(?<=\n) +")
_EMPTY_LINES: Final = re.compile(r"\n{3,}")
_NOT_ALPHANUMERIC: Final = re.compile(r"[\W_]+")
_DIGITS: Final = re.compile(r"\d+")


@dataclass
class CleaningCounts:
    """What cleaning saw and did, in documents unless the name says otherwise.

    Attributes:
        read: rows of the file with a document, blank ones not counted.
        blank: nothing but white space; always left out.
        null: left out by `drop_null`.
        urls_removed: URLs, not documents.
        whitespace_changed: documents that `normalize_whitespace` changed.
        emptied: nothing was left of them.
        too_short, too_long: left out by `min_chars` and `max_chars`.
        exact_duplicates, near_duplicates: left out by `drop_duplicates`.
        kept: of `read`, all that was not left out.
    """

    read: int = 0
    blank: int = 0
    null: int = 0
    urls_removed: int = 0
    whitespace_changed: int = 0
    emptied: int = 0
    too_short: int = 0
    too_long: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    kept: int = 0

    def to_dict(self) -> dict[str, int]:
        """For the report."""
        return asdict(self)


def cleaned(
    documents: Iterable[Document], options: CleanConfig, counts: CleaningCounts
) -> Iterator[Document]:
    """The documents that are left, changed as asked; `counts` is brought up to date on the way."""
    filters = _Duplicates(options.drop_duplicates)
    for original in documents:
        if not original.content.strip():
            counts.blank += 1
            continue
        counts.read += 1
        document = _rewritten(original, options, counts)
        if not document.content.strip():
            counts.emptied += 1
        elif _has_good_length(document, options, counts) and not filters.seen(document, counts):
            counts.kept += 1
            yield document


def _rewritten(document: Document, options: CleanConfig, counts: CleaningCounts) -> Document:
    if options.remove_urls:

        def without_urls(text: str) -> str:
            text, number = _URL.subn("", text)
            counts.urls_removed += number
            return text

        document = _mapped(document, without_urls)
    if options.normalize_whitespace:
        before, document = document, _mapped(document, normalized_whitespace)
        counts.whitespace_changed += before != document
    return document


def _mapped(document: Document, change: Callable[[str], str]) -> Document:
    if document.messages is None:
        return replace(document, text=change(document.text))
    changed = (Message(each.role, change(each.content)) for each in document.messages)
    return replace(document, messages=tuple(changed))


def normalized_whitespace(text: str) -> str:
    """One space between words, none at either end of a line, at most one empty line in a row.

    Indentation goes, too, so this is for prose.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _BLANKS_AT_LINE_END.sub("", _BLANKS.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()


def _has_good_length(document: Document, options: CleanConfig, counts: CleaningCounts) -> bool:
    length = len(document.content)
    too_short = options.min_chars is not None and length < options.min_chars
    too_long = options.max_chars is not None and length > options.max_chars
    counts.too_short += too_short
    counts.too_long += too_long
    return not (too_short or too_long)


@dataclass
class _Duplicates:
    """Hashes of everything seen: about 70 bytes of memory for each document."""

    kind: str
    _exact: set[int] = field(default_factory=set)
    _near: set[int] = field(default_factory=set)

    def seen(self, document: Document, counts: CleaningCounts) -> bool:
        """Whether one like it came before; the first of them stays."""
        if self.kind == "none":
            return False
        if _is_in(self._exact, exact_hash(document)):
            counts.exact_duplicates += 1
            return True
        if self.kind == "near" and _is_in(self._near, near_hash(document)):
            counts.near_duplicates += 1
            return True
        return False


def _is_in(known: set[int], value: int) -> bool:
    if value in known:
        return True
    known.add(value)
    return False


def count_duplicates(documents: Iterable[Document]) -> tuple[int, int]:
    """Documents that repeat an earlier one: exactly, and otherwise nearly."""
    counts, finder = CleaningCounts(), _Duplicates("near")
    for document in documents:
        finder.seen(document, counts)
    return counts.exact_duplicates, counts.near_duplicates


def exact_hash(document: Document) -> int:
    """Of roles and contents, 64 bits of BLAKE2."""
    turns = document.messages or (Message("", document.text),)
    parts = (part for turn in turns for part in (turn.role, turn.content))
    return _hash("".join(f"{len(part)}:{part}" for part in parts))


def near_hash(document: Document) -> int:
    """Of letters alone, case and compatibility forms folded, every number as 0."""
    folded = unicodedata.normalize("NFKC", document.content).casefold()
    return _hash(_DIGITS.sub("0", _NOT_ALPHANUMERIC.sub("", folded)))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
