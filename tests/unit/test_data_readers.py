"""pipeline.quant.data.readers: good files of every kind, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PlanError
from pipeline.quant.data import Message, TextFile, load_documents
from pipeline.quant.data.readers import documents, rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GREETING = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _texts(source: TextFile) -> list[str]:
    return [document.text for document in documents(source)]


def _problems(source: TextFile) -> list[str]:
    with pytest.raises(PlanError) as caught:
        list(documents(source))
    return [str(problem).replace(str(source.path), "F") for problem in caught.value.problems]


def _parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def _csv(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "data.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path: Path, ending: str) -> None:
    lines = ["id,body", '1,"a, ""b""', 'c"', "", "2,plain", '3,""']
    path = _csv(tmp_path, "\ufeff" + ending.join(lines) + ending)
    found = list(documents(TextFile(path, "body")))
    assert [each.text for each in found] == [f'a, "b"{ending}c', "plain", ""]
    assert [each.where.removeprefix(str(path)) for each in found] == [":2", ":5", ":6"]


def test_every_wrong_csv_row_is_listed(tmp_path: Path) -> None:
    path = _csv(tmp_path, 'text,id\nfine,1\nshort\nlong,2,3\n"a"b,4\nnul\0,5\n"never closed,6\n')
    allowed = "; allowed: comma-separated cells, quotes around commas and quotes"
    problems = _problems(TextFile(path))
    assert problems[:3] == [
        "F:3: has 1 cells, the header has 2" + allowed,
        "F:4: has 3 cells, the header has 2" + allowed,
        "F:5: is no CSV row: ',' expected after '\"'" + allowed,
    ]
    assert problems[3].startswith("F:6: ")
    assert "NUL" in problems[3]
    assert problems[4] == "F:7: is no CSV row: unexpected end of data" + allowed


@pytest.mark.parametrize(
    ("header", "column", "expected"),
    [
        ("id,body,title\n", None, "F:1: has no column 'text'; allowed: id, body, title; fix: name"),
        (
            "id,texts\n",
            None,
            "F:1: has no column 'text'; allowed: id, texts; fix: did you mean `te",
        ),
        ("a,a\n", "a", "F:1: has 2 columns 'a'; fix: rename one of them"),
        ("", "a", "F:1: has no column 'a'; allowed: a file with columns"),
    ],
)
def test_a_csv_file_without_its_column(
    tmp_path: Path, header: str, column: str | None, expected: str
) -> None:
    (problem,) = _problems(TextFile(_csv(tmp_path, header), column))
    assert problem.startswith(expected)


def test_a_csv_cell_larger_than_the_librarys_limit(tmp_path: Path) -> None:
    path = _csv(tmp_path, f"text\n{'x' * 200_000}\n")
    assert [len(text) for text in _texts(TextFile(path))] == [200_000]


def test_csv_that_is_no_utf8_is_located_by_byte(tmp_path: Path) -> None:
    path = _csv(tmp_path, "text\nma\u00f1ana\n".encode("latin-1"))
    assert _problems(TextFile(path)) == [
        "F: invalid UTF-8 at byte offset 7 (0xf1); fix: save the file as UTF-8"
    ]


def test_dialogues_in_a_csv_file_are_refused(tmp_path: Path) -> None:
    path = _csv(tmp_path, "messages\n")
    (problem,) = _problems(TextFile(path, messages="messages"))
    assert problem.startswith("F: a CSV cell cannot hold a dialogue; fix: convert the file to .jso")


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet_text_of_every_string_type(tmp_path: Path, kind: str) -> None:
    texts = [f"text {index}" for index in range(700)]  # more than one batch
    types = {"string": pa.string(), "large_string": pa.large_string()}
    if kind == "dictionary":
        column = pa.array(texts).dictionary_encode()
    else:
        column = pa.array(texts, types.get(kind) or pa.string_view())
    path = _parquet(tmp_path / "data.parquet", body=column, id=list(range(700)))
    assert _texts(TextFile(path, "body")) == texts


def test_parquet_is_read_row_group_after_row_group(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [str(n) for n in range(100)]}), path, row_group_size=7)
    reader = rows(TextFile(path))
    assert next(reader).where.endswith("data.parquet: row 1")
    assert sum(1 for _ in reader) == 99


@pytest.mark.parametrize(
    ("columns", "source", "expected"),
    [
        ({"body": ["a"]}, {}, "F: has no column 'text'; allowed: body; fix: name one of them"),
        (
            {"text": [1]},
            {},
            "F: column 'text' is of type int64; allowed: a column of strings; fix: name another",
        ),
        (
            {"turns": [["a"]]},
            {"messages": "turns"},
            "F: column 'turns' is of type list<",
        ),
        (
            {"turns": [[{"from": "user", "value": "a"}]]},
            {"messages": "turns"},
            "F: column 'turns' is of type list<",
        ),
        ({"text": pa.array([b"a"])}, {}, "F: column 'text' is of type binary"),
    ],
)
def test_a_parquet_file_without_its_column(
    tmp_path: Path, columns: dict[str, Any], source: dict[str, str], expected: str
) -> None:
    path = _parquet(tmp_path / "data.parquet", **columns)
    (problem,) = _problems(TextFile(path, **source))
    assert problem.startswith(expected)


def _damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 3
    damaged = {
        "empty": b"",
        "text": b"this is no parquet file, whatever its name says",
        "truncated": data[: len(data) // 2],
        "no footer": data[:-4] + b"XXXX",
        "page": data[:middle] + bytes(64) + data[middle + 64 :],
    }
    path.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "no footer", "page"])
def test_a_broken_parquet_file(tmp_path: Path, how: str) -> None:
    texts = [f"{index} " * 50 for index in range(500)]
    path = _parquet(tmp_path / "data.parquet", text=texts)
    _damaged(path, how)
    (problem,) = _problems(TextFile(path))
    assert problem.startswith("F: is no readable Parquet file: ")
    assert problem.endswith("fix: fetch it again")


def test_a_parquet_cell_that_is_no_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"ab\xff"]).view(pa.string())
    path = _parquet(tmp_path / "data.parquet", text=raw)
    (problem,) = _problems(TextFile(path))
    assert problem.startswith('F: row 2: "text" is invalid UTF-8 at byte 2; allowed: UTF-8 text')


def _nulls(tmp_path: Path, kind: str) -> TextFile:
    path = tmp_path / f"data.{kind}"
    values = ["a", None, "b", None]
    if kind == "parquet":
        _parquet(path, text=values)
    else:
        path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return TextFile(path)


@pytest.mark.parametrize(("kind", "place"), [("parquet", "F: row"), ("jsonl", "F:")])
def test_null_cells_are_refused_unless_dropped(tmp_path: Path, kind: str, place: str) -> None:
    source = _nulls(tmp_path, kind)
    allowed = "; allowed: a text in every row, or `clean: {drop_null: true}`"
    gap = " " if kind == "parquet" else ""
    assert _problems(source) == [f'{place}{gap}{row}: "text" is null{allowed}' for row in (2, 4)]
    dropped: list[int] = []
    kept = documents(source, on_null=lambda: dropped.append(1))
    assert [each.text for each in kept] == ["a", "b"]
    assert len(dropped) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dialogues(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    turns = [{**message, "weight": 1} for message in GREETING]  # other keys are not read
    if kind == "parquet":
        _parquet(path, talk=[turns, []])
    else:
        path.write_text(json.dumps({"talk": turns}) + "\n" + json.dumps({"talk": []}) + "\n")
    first, second = documents(TextFile(path, messages="talk"))
    assert first.messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert first.content == "Hi\nHello"
    assert second.messages == ()
    assert load_documents(TextFile(path, messages="talk")) == [first]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Hi", '"talk" is a str, not a list of messages'),
        (["Hi"], '"talk"[0] is a str, not an object'),
        ([{"role": "user"}], '"talk"[0] has no key "content", only [\'role\']'),
        ([GREETING[0], {"role": 3, "content": ""}], '"talk"[1]["role"] is a int, not a string'),
        ([{"role": "user", "content": None}], '"talk"[0]["content"] is null'),
        ([{"role": "user", "content": ["a"]}], '"talk"[0]["content"] is a list, not a string'),
    ],
)
def test_wrong_dialogues(tmp_path: Path, value: object, expected: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"talk": value}) + "\n")
    (problem,) = _problems(TextFile(path, messages="talk"))
    assert problem.startswith(f'F:1: {expected}; allowed: one {{"talk": [{{...}}]}} object per l')


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("text")
    (problem,) = _problems(TextFile(path, "body"))
    assert problem == (
        "F: a .txt file has no columns, so no 'body'; fix: leave `column:` and `messages:` out"
    )


def test_a_directory_and_a_compressed_file_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "dir.txt").mkdir()
    assert _problems(TextFile(tmp_path / "dir.txt"))[0].startswith("F: is not a file")
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert _problems(TextFile(path))[0].startswith("F: invalid UTF-8 at byte offset 1 (0x8b)")


def test_json_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ' + "[" * 200_000 + "\n")
    (problem,) = _problems(TextFile(path))
    assert problem.startswith("F:1: is JSON that is nested too deeply")
