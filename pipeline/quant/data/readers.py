"""Readers of .txt, .jsonl, .csv and .parquet: rows one after another, never a whole file in memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Final

from pipeline.errors import PlanError, Problem
from pipeline.quant.data.documents import (
    DOCUMENT_SEPARATOR,
    Document,
    Row,
    RowError,
    RowProblems,
    TextFile,
    decoded_lines,
    document_of,
    json_type,
    missing_column,
)
from pipeline.quant.data.parquet import parquet_rows

_MAX_CELL_CHARS: Final = 1 << 28
"""csv refuses cells of more than 131072 characters unless told otherwise; a book has more."""


def rows(source: TextFile) -> Iterator[Row]:
    """Every row of a file, in order; blank ones too.

    Raises:
        PlanError: another suffix, a file that cannot be read, no such column; and, after the last
            row, every row that is wrong.
    """
    reader = READERS.get(source.path.suffix)
    if reader is None:
        raise PlanError(
            Problem(
                str(source.path),
                f"text data has the suffix {source.path.suffix!r}",
                allowed=", ".join(READERS),
                fix="rename or convert the file",
            )
        )
    if not source.path.is_file() and source.path.exists():
        raise PlanError(Problem(str(source.path), "is not a file", allowed=", ".join(READERS)))
    yield from reader(source)


def documents(source: TextFile, *, on_null: Callable[[], None] | None = None) -> Iterator[Document]:
    """The documents of a file, blank ones too.

    Args:
        on_null: called for each null cell, which is left out; None: null cells are refused.

    Raises:
        PlanError: see `rows`; also every row that is null, listed after the last row.
    """
    nulls = RowProblems(source.path, "a text in every row, or `clean: {drop_null: true}`")
    for row in rows(source):
        if isinstance(row, Document):
            yield row
        elif on_null is not None:
            on_null()
        else:
            nulls.add(row.where, f'"{source.field}" is null')
    nulls.raise_any()


def _text_rows(source: TextFile) -> Iterator[Row]:
    _refuse_columns(source)
    lines: list[str] = []
    start = number = 1
    line = ""
    for number, line in enumerate(decoded_lines(source.path), start=1):
        if line.rstrip("\r\n") == DOCUMENT_SEPARATOR:
            # The line feed before a separator belongs to the separator.
            yield Document(f"{source.path}:{start}", text="".join(lines).removesuffix("\n"))
            lines, start = [], number + 1
        else:
            lines.append(line)
    yield Document(f"{source.path}:{start}", text="".join(lines))


def _refuse_columns(source: TextFile) -> None:
    if source.column is not None or source.messages is not None:
        what = f"a .txt file has no columns, so no {source.field!r}"
        raise PlanError(Problem(str(source.path), what, fix="leave `column:` and `messages:` out"))


def _json_rows(source: TextFile) -> Iterator[Row]:
    value = "[{...}]" if source.messages else '"..."'
    expected = f'one {{"{source.field}": {value}}} object per line'
    problems = RowProblems(source.path, expected)
    for number, line in enumerate(decoded_lines(source.path), start=1):
        if line.strip():
            where = f"{source.path}:{number}"
            try:
                yield _json_row(line.removesuffix("\n"), where, source)
            except RowError as error:
                problems.add(where, str(error))
    problems.raise_any()


def _json_row(line: str, where: str, source: TextFile) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("is JSON that is nested too deeply") from None
    if not isinstance(value, dict):
        raise RowError(f"is {json_type(value)}")
    field = source.field
    if field not in value:
        raise RowError(f'has no key "{field}", only {sorted(value)}')
    return document_of(value[field], where, field=field, dialogue=source.messages is not None)


def _csv_rows(source: TextFile) -> Iterator[Row]:
    refuse_csv_dialogues(source)
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(_csv_lines(source), strict=True)
    problems = RowProblems(source.path, "comma-separated cells, quotes around commas and quotes")
    header, column = None, 0
    while True:
        where = f"{source.path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problems.add(where, f"is no CSV row: {error}")
            continue
        if cells is None:
            break
        if header is None:
            header, column = cells, csv_column(source, cells)
        elif len(cells) == len(header):
            yield _csv_row(cells[column], where, source, problems)
        elif cells:  # an empty line is no row
            problems.add(where, f"has {len(cells)} cells, the header has {len(header)}")
    if header is None:
        csv_column(source, [])
    problems.raise_any()


def _csv_row(cell: str, where: str, source: TextFile, problems: RowProblems) -> Row:
    if "\0" in cell:
        problems.add(where, f'"{source.field}" holds a NUL character')
    return document_of(cell, where, field=source.field, dialogue=False)


def _csv_lines(source: TextFile) -> Iterator[str]:
    for number, line in enumerate(decoded_lines(source.path)):
        # Spreadsheets begin UTF-8 files with a byte order mark.
        yield line.removeprefix("\ufeff") if number == 0 else line


def refuse_csv_dialogues(source: TextFile) -> None:
    """Raise PlanError: a cell of a CSV file is text, no list of messages."""
    if source.messages is not None:
        what = "a CSV cell cannot hold a dialogue"
        fix = "convert the file to .jsonl or .parquet"
        raise PlanError(Problem(str(source.path), what, fix=fix))


def csv_column(source: TextFile, header: list[str]) -> int:
    """Index of the column in a header.

    Raises:
        PlanError: it has none, or several of that name.
    """
    where = f"{source.path}:1"
    if source.field not in header:
        raise PlanError(missing_column(where, source.field, header))
    if header.count(source.field) > 1:
        what = f"has {header.count(source.field)} columns {source.field!r}"
        raise PlanError(Problem(where, what, fix="rename one of them"))
    return header.index(source.field)


READERS: Final[dict[str, Callable[[TextFile], Iterator[Row]]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": parquet_rows,
}
"""Suffix -> reader."""
