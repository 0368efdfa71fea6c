"""What a text file holds: documents, which are plain texts or dialogues, read one after another."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.errors import PlanError, Problem

DOCUMENT_SEPARATOR: Final = "<|endoftext|>"
"""A line of a .txt file holding only this separates two documents."""

DEFAULT_COLUMN: Final = "text"

MAX_LISTED: Final = 20
"""Problems listed for one file; a file in the wrong format has as many as it has lines."""

MAX_ALIKE: Final = 3
"""Of them, those that say the same but for numbers."""


_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class TextFile:
    """A file of documents, and where in it they stand.

    Attributes:
        path: ends with .txt, .jsonl, .csv or .parquet.
        column: key or column with a text per row; None: "text". A .txt file has none.
        messages: key or column with a dialogue per row, instead of `column`.
    """

    path: Path
    column: str | None = None
    messages: str | None = None

    @property
    def field(self) -> str:
        """Name of the key or column that is read."""
        return self.messages or self.column or DEFAULT_COLUMN


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue. Other keys than these two are not read."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text or one dialogue.

    Attributes:
        where: "file:line" or "file: row n", for problems found later.
        text: of a plain document; "" for a dialogue.
        messages: of a dialogue; None for a plain document.
    """

    where: str
    text: str = ""
    messages: tuple[Message, ...] | None = None

    @property
    def content(self) -> str:
        """All its text, without roles."""
        if self.messages is None:
            return self.text
        return "\n".join(message.content for message in self.messages)


class RowError(Exception):
    """One row is wrong; readers turn it into a Problem that has the row's place."""


@dataclass(frozen=True)
class NullRow:
    """A row whose cell is null: an error, unless null rows are to be dropped."""

    where: str


Row = Document | NullRow


class RowProblems:
    """Collects what is wrong with the rows of one file; lists MAX_LISTED of it, MAX_ALIKE of a kind."""

    def __init__(self, path: Path, allowed: str) -> None:
        self._path = path
        self._allowed = allowed
        self._problems: list[Problem] = []
        self._number = 0
        self._alike: Counter[str] = Counter()

    def add(self, where: str, what: str) -> None:
        """Note one wrong row."""
        self._number += 1
        kind = _NUMBERS.sub("0", what)
        self._alike[kind] += 1
        if self._alike[kind] <= MAX_ALIKE and len(self._problems) < MAX_LISTED:
            self._problems.append(Problem(where, what, allowed=self._allowed))

    def raise_any(self) -> None:
        """Raise PlanError with the list, if it has any."""
        left = self._number - len(self._problems)
        if left:
            more = "line is" if left == 1 else "lines are"
            self._problems.append(Problem(str(self._path), f"{left} more {more} wrong"))
        if self._problems:
            raise PlanError(self._problems)


def document_of(value: object, where: str, *, field: str, dialogue: bool) -> Row:
    """A cell as a document.

    Args:
        value: a string or, with `dialogue`, a list of {"role", "content"} mappings; None is null.

    Raises:
        RowError: it is something else.
    """
    if value is None:
        return NullRow(where)
    if dialogue:
        return Document(where, messages=tuple(_messages(value, field)))
    return Document(where, text=_string(value, f'"{field}"'))


def _messages(value: object, field: str) -> Iterator[Message]:
    if not isinstance(value, list):
        raise RowError(f'"{field}" is a {type(value).__name__}, not a list of messages')
    for index, message in enumerate(value):
        name = f'"{field}"[{index}]'
        if not isinstance(message, dict):
            raise RowError(f"{name} is a {type(message).__name__}, not an object")
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise RowError(f'{name} has no key "{missing[0]}", only {sorted(message)}')
        role = _string(message["role"], f'{name}["role"]')
        yield Message(role, _string(message["content"], f'{name}["content"]'))


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}, not a string"
        raise RowError(f"{name} is {kind}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} has half a surrogate pair at character {error.start}") from None
    return value


def missing_column(where: str, field: str, columns: Collection[str]) -> Problem:
    """The problem of a file without the column that the YAML names."""
    close = difflib.get_close_matches(field, columns, n=1, cutoff=0.6)
    return Problem(
        where,
        f"has no column {field!r}",
        allowed=", ".join(columns) if columns else "a file with columns",
        fix=f"did you mean `{close[0]}`?"
        if close
        else "name one of them: `column:` or `messages:`",
    )


def unreadable(path: Path, error: OSError) -> PlanError:
    """The error of a file that cannot be opened or read."""
    what = f"text data cannot be read: {error.strerror or error}"
    return PlanError(Problem(str(path), what, fix="give the path of a readable text file"))


def utf8(data: bytes, path: Path, offset: int) -> str:
    """Decode `data`, which stands at byte `offset` of the file.

    Raises:
        PlanError: it is not UTF-8; names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at, byte = offset + error.start, data[error.start]
        what = f"invalid UTF-8 at byte offset {at} (0x{byte:02x})"
        raise PlanError(Problem(str(path), what, fix="save the file as UTF-8")) from error


def decoded_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, split at line feeds only: form feeds and the like are text here.

    Raises:
        PlanError: the file cannot be read, or is not UTF-8.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                yield utf8(line, path, offset)
                offset += len(line)
    except OSError as error:
        raise unreadable(path, error) from error


def json_type(value: Any) -> str:
    """How to call a JSON value that is no object."""
    return f"a JSON {type(value).__name__}, not an object"
