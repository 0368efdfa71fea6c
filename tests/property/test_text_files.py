"""Any texts, written by the libraries that write such files, come back as they were."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import PlanError
from pipeline.quant.data import DOCUMENT_SEPARATOR, TextFile
from pipeline.quant.data.readers import READERS, documents

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def _write(path: Path, texts: list[str], row_group_size: int) -> None:
    if path.suffix == ".parquet":
        pq.write_table(
            pa.table({"a": texts, "b": texts[::-1]}), path, row_group_size=row_group_size
        )
    elif path.suffix == ".jsonl":
        lines = (json.dumps({"b": text[::-1], "a": text}, ensure_ascii=False) for text in texts)
        path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["b", "a"])
            writer.writerows([text[::-1], text] for text in texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@QUIET
@given(texts=st.lists(TEXT, min_size=1, max_size=8), row_group_size=st.integers(1, 4))
def test_columns_come_back(
    tmp_path: Path, suffix: str, texts: list[str], row_group_size: int
) -> None:
    path = tmp_path / f"data{suffix}"
    _write(path, texts, row_group_size)
    assert [each.text for each in documents(TextFile(path, "a"))] == texts


@QUIET
@given(texts=st.lists(TEXT.filter(lambda text: "\r" not in text), min_size=1, max_size=8))
def test_text_files_come_back(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(f"\n{DOCUMENT_SEPARATOR}\n".join(texts).encode())
    assert [each.text for each in documents(TextFile(path))] == texts


def _complaints(source: TextFile) -> list[str]:
    """Where the problems are; a user's error is the only one that may come."""
    try:
        list(documents(source))
    except PlanError as error:
        return [problem.where for problem in error.problems]
    return []


@pytest.mark.parametrize("suffix", READERS)
@QUIET
@given(content=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_words(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    assert all(str(path) in where for where in _complaints(TextFile(path)))


@QUIET
@given(data=st.data())
def test_a_damaged_parquet_file_is_read_or_refused_with_words(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "data.parquet"
    _write(path, [f"text {number}" for number in range(40)], 10)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert all(str(path) in where for where in _complaints(TextFile(path, "a")))
