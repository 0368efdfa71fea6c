"""What moments show about a text file: reads a small one whole, of a larger one the beginning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.calibration_config import CleanConfig
from pipeline.errors import PipelineError, Problem
from pipeline.quant.data.candidates import packed, room_for_text
from pipeline.quant.data.cleaning import CleaningCounts, cleaned
from pipeline.quant.data.documents import Document, TextFile
from pipeline.quant.data.encoding import TextEncoder
from pipeline.quant.data.parquet import parquet_num_rows
from pipeline.quant.data.readers import READERS, documents
from pipeline.quant.data.selection import check_enough, cleaned_away, no_text

CHECK_BYTES: Final = 4 << 20
"""Larger files are read to the end only when they are used: plan takes less than a second."""

COUNT_BYTES: Final = 1 << 19
"""Of a text up to this size the windows are counted, with the tokenizer itself."""

AMPLE_BYTES_PER_TOKEN: Final = 8
"""A text with so many for each token that is asked for need not be counted."""

COMPARE_CHARS: Final = 1 << 18
"""Enough characters to know what kind of text it is."""


_NO_CLEANING: Final = CleanConfig()


@dataclass(frozen=True)
class Needed:
    """What is asked of a file.

    Attributes:
        num_windows, seq_len: windows and their tokens.
        padded: each window takes a document of its own.
        clean: what is taken out before anything is cut.
        encoder: the tokenizer, if it is there and quick to open; None: bytes have to do.
    """

    num_windows: int
    seq_len: int
    padded: bool = False
    clean: CleanConfig = _NO_CLEANING
    encoder: Callable[[], TextEncoder | None] = lambda: None


def file_problems(
    source: TextFile, where: Callable[..., str], source_dir: Path | None, needed: Needed
) -> Iterator[Problem]:
    """Everything that is wrong with a text file, as far as it shows in moments.

    Args:
        source: need not exist; then only its name and columns are looked at.
        where: keys below the section that has `data:` -> their place in the YAML.
        source_dir: the checkpoint, for its chat template; None before a download.
    """
    named = list(_name_problems(source, where))
    yield from named
    if source.messages is not None and source_dir is not None and not has_template(source_dir):
        what = "the model's tokenizer has no chat template, so dialogues have no form"
        fix = "put a chat_template.jinja beside the weights, or give plain text: `column:`"
        yield Problem(where("messages"), what, fix=fix)
    if named or not source.path.is_file():
        return
    try:
        problem = _content_problem(source, needed)
        problems: tuple[Problem, ...] = (problem,) if problem else ()
    except PipelineError as error:
        problems = error.problems
    for each in problems:
        key = "data"
        if repr(source.field) in each.what or f'"{source.field}"' in each.what:
            key = "messages" if source.messages else "column" if source.column else "data"
        yield replace(each, where=f"{where(key)}: {each.where}")


def _name_problems(source: TextFile, where: Callable[..., str]) -> Iterator[Problem]:
    suffix = source.path.suffix
    if suffix not in READERS:
        what = f"{source.path}: text data has the suffix {suffix!r}"
        yield Problem(where("data"), what, ", ".join(READERS), "rename or convert the file")
    for key in ("column", "messages"):
        if getattr(source, key) is not None and suffix == ".txt":
            what = "a .txt file has no columns"
            yield Problem(where(key), what, fix=f"leave it out, or give {_WITH_COLUMNS}")
    if source.messages is not None and suffix == ".csv":
        yield Problem(
            where("messages"), "a CSV cell cannot hold a dialogue", fix="give .jsonl or .parquet"
        )


_WITH_COLUMNS: Final = ", ".join(suffix for suffix in READERS if suffix != ".txt")


def _content_problem(source: TextFile, needed: Needed) -> Problem | None:
    """A file that holds too little; what else is wrong is raised."""
    large = source.path.stat().st_size > CHECK_BYTES
    if source.path.suffix == ".parquet" and large:
        return _too_few(source.path, parquet_num_rows(source), needed)
    counts = CleaningCounts()
    start = _Beginning(
        documents(source, on_null=(lambda: None) if needed.clean.drop_null else None)
    )
    kept = list(cleaned(start, needed.clean, counts))
    if start.is_cut:
        return None
    if not kept and counts.read:
        return cleaned_away(source.path, counts.read)
    length = sum(len(document.content.encode()) for document in kept)
    problem = _too_few(source.path, len(kept), needed)
    problem = problem or _too_short(source.path, length, len(kept), needed)
    if problem is None and length <= COUNT_BYTES and source.messages is None:
        _count(source.path, kept, length, needed)
    return problem


class _Beginning:
    """The first CHECK_BYTES of documents; `is_cut`: there are more."""

    def __init__(self, read: Iterator[Document]) -> None:
        self._read = read
        self.is_cut = False

    def __iter__(self) -> Iterator[Document]:
        length = 0
        for document in self._read:
            length += len(document.content.encode())
            if length > CHECK_BYTES:
                self.is_cut = True
                return
            yield document


def _count(path: Path, kept: Sequence[Document], length: int, needed: Needed) -> None:
    """Raise what using the text would raise, if it gives fewer windows than are asked for."""
    if needed.padded or length >= AMPLE_BYTES_PER_TOKEN * needed.num_windows * needed.seq_len:
        return
    encoder = needed.encoder()
    if encoder is not None:
        candidates = packed(kept, encoder, room_for_text(encoder, needed.seq_len, str(path)))
        check_enough(candidates, needed.num_windows, needed.seq_len, str(path))


def _too_few(path: Path, number: int, needed: Needed) -> Problem | None:
    if number == 0:
        return no_text(path)
    if not needed.padded or number >= needed.num_windows:
        return None
    return Problem(
        str(path),
        f"holds {number} documents, {needed.num_windows} padded samples are asked for",
        allowed=f"at most {number}",
        fix="give more text, or `layout: packed`",
    )


def _too_short(path: Path, num_bytes: int, number: int, needed: Needed) -> Problem | None:
    """Only what is certain without the tokenizer: hardly any gives two tokens for one byte."""
    most = 2 * (num_bytes + number)
    tokens = needed.num_windows * needed.seq_len
    if needed.padded or most >= tokens:
        return None
    return Problem(
        str(path),
        f"holds {num_bytes} bytes of text, {needed.num_windows} windows of {needed.seq_len} tokens "
        f"need {tokens} tokens",
        fix="give more text, or lower the number of windows or their length",
    )


def has_template(source_dir: Path) -> bool:
    """Whether a checkpoint comes with a chat template, by its files."""
    if any((source_dir / f"chat_template.{suffix}").is_file() for suffix in ("jinja", "json")):
        return True
    try:
        config = json.loads((source_dir / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):  # the checkpoint's own check reports it
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def beginning(source: TextFile, max_chars: int = COMPARE_CHARS) -> list[str]:
    """Documents up to about so many characters; [] of a file that is missing or has wrong rows.

    Also [] of a large Parquet file, of which nothing but the footer is cheap.
    """
    path = source.path
    if not path.is_file() or (path.suffix == ".parquet" and path.stat().st_size > CHECK_BYTES):
        return []
    texts: list[str] = []
    try:
        for document in documents(source, on_null=lambda: None):
            texts.append(document.content[:max_chars])
            max_chars -= len(texts[-1])
            if max_chars <= 0:
                break
    except PipelineError:  # `file_problems` has listed it
        return []
    return texts
