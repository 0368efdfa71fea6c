"""Rows of a Parquet file through pyarrow: batch by batch, only the column that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.errors import PlanError, Problem, ToolError
from pipeline.quant.data.documents import (
    NullRow,
    Row,
    RowError,
    RowProblems,
    TextFile,
    document_of,
    missing_column,
    unreadable,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS_AT_ONCE: Final = 256
_BUFFER_BYTES: Final = 1 << 20


def parquet_rows(source: TextFile) -> Iterator[Row]:
    """Every row of the file, in order.

    Raises:
        PlanError: the file is broken, has no such column or one of another type; after the last row,
            every cell that is no UTF-8 or no dialogue.
        ToolError: pyarrow is not installed.
    """
    problems = RowProblems(source.path, "UTF-8 text in every row")
    number = 0
    with _opened(source.path) as file:
        _check_column(source, file.schema_arrow)
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[source.field], use_threads=False):
            for cell in batch.column(0):
                number += 1
                where = f"{source.path}: row {number}"
                try:
                    yield _row(cell, where, source)
                except RowError as error:
                    problems.add(where, str(error))
    problems.raise_any()


def parquet_num_rows(source: TextFile) -> int:
    """Rows of the file, from its footer; also checks that the column is there and of the right type.

    Raises:
        PlanError, ToolError: see `parquet_rows`.
    """
    with _opened(source.path) as file:
        _check_column(source, file.schema_arrow)
        return int(file.metadata.num_rows)


def _row(cell: pa.Scalar[Any], where: str, source: TextFile) -> Row:
    if not cell.is_valid:
        return NullRow(where)
    try:
        value = cell.as_py()
    except UnicodeDecodeError as error:
        raise RowError(f'"{source.field}" is invalid UTF-8 at byte {error.start}') from None
    return document_of(value, where, field=source.field, dialogue=source.messages is not None)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        what = f"pyarrow is needed to read it: {error}"
        raise ToolError(Problem(str(path), what, fix="pip install pyarrow")) from error
    try:
        # Without these, a whole column of a row group is in memory; some files have one row group.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise PlanError(_broken(path, error)) from error
    except OSError as error:
        # pyarrow raises it for damaged pages, too; those have no errno.
        if error.errno is not None:
            raise unreadable(path, error) from error
        raise PlanError(_broken(path, error)) from error


def _broken(path: Path, error: Exception) -> Problem:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Problem(str(path), f"is no readable Parquet file: {reason}", fix="fetch it again")


def _check_column(source: TextFile, schema: pa.Schema) -> None:
    field = source.field
    if field not in schema.names:
        raise PlanError(missing_column(str(source.path), field, list(schema.names)))
    kind = schema.field(field).type
    if source.messages is None:
        fits, allowed = _is_text(kind), "a column of strings"
    else:
        fits, allowed = _is_dialogue(kind), "list<struct<role: string, content: string>>"
    if not fits:
        what = f"column {field!r} is of type {kind}"
        raise PlanError(Problem(str(source.path), what, allowed, "name another column"))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _is_dialogue(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    message = kind.value_type
    if not pa.types.is_struct(message):
        return False
    types = {message.field(i).name: message.field(i).type for i in range(message.num_fields)}
    return all(name in types and _is_text(types[name]) for name in ("role", "content"))
