"""Text for calibration and for measuring: read strictly, cut into windows of token ids, named by digest.

A text is cut the way the model will be used: every window begins like a prompt (with the tokenizer's
prefix, usually the begin-of-sequence token), and documents follow each other with the
end-of-sequence token between them. Nothing is padded, so no pad token can enter a statistic.

Shape suffixes: W windows, T tokens of one window, B windows of one batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PlanError, Problem

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""A line of a .txt file holding only this separates two documents."""

MAX_LISTED = 20
"""Problems listed for one file; a file in the wrong format has as many as it has lines."""


class TextEncoder(Protocol):
    """What is needed of a tokenizer; `pipeline.quant.source.SourceTokenizer` is the real one."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids that begin every prompt."""

    @property
    def separator(self) -> tuple[int, ...]:
        """Token ids between two documents."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""


@dataclass(frozen=True)
class TokenWindows:
    """Chosen windows of token ids.

    Attributes:
        tokens_WT: int64 [W, T].
        num_available: windows that the text would have given.
        num_text_tokens: tokens of the whole text, separators included, prefixes not.
    """

    tokens_WT: NDArray[np.int64]
    num_available: int
    num_text_tokens: int

    @property
    def digest(self) -> str:
        """sha256 of the shape and of exactly the token ids used, as lower-case hex."""
        tokens = np.ascontiguousarray(self.tokens_WT, dtype="<i8")
        shape = f"{tokens.shape[0]}x{tokens.shape[1]}:".encode()
        return hashlib.sha256(shape + tokens.tobytes()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Views int64 [B, T] in order; the last one may be smaller."""
        for first in range(0, len(self.tokens_WT), batch_size):
            yield self.tokens_WT[first : first + batch_size]


def load_texts(path: Path) -> list[str]:
    """Documents of a .txt file (split on DOCUMENT_SEPARATOR lines) or a .jsonl file ("text" keys).

    Documents that hold only white space are left out: they have no content to measure.

    Raises:
        PlanError: no such file, another suffix, invalid UTF-8 (with the byte offset), a line that
            is not an object with a string "text", or no document at all.
    """
    readers = {".txt": _text_documents, ".jsonl": _json_documents}
    reader = readers.get(path.suffix)
    if reader is None:
        raise PlanError(
            Problem(
                str(path),
                f"text data has the suffix {path.suffix!r}",
                allowed=", ".join(readers),
                fix="rename or convert the file",
            )
        )
    documents = [text for text in reader(_read_utf8(path), path) if text.strip()]
    if not documents:
        raise PlanError(
            Problem(str(path), "holds no text", fix="give a file with at least one document")
        )
    return documents


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(
            Problem(
                str(path),
                f"text data cannot be read: {error.strerror}",
                fix="give the path of a readable .txt or .jsonl file",
            )
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(
            Problem(
                str(path),
                f"invalid UTF-8 at byte offset {error.start} (0x{data[error.start]:02x})",
                fix="save the file as UTF-8",
            )
        ) from error


def _text_documents(content: str, path: Path) -> list[str]:
    documents: list[list[str]] = [[]]
    # Not splitlines(): it also splits at form feeds and other characters that are text here.
    for line in content.split("\n"):
        if line.rstrip("\r") == DOCUMENT_SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines) for lines in documents]


def _json_documents(content: str, path: Path) -> list[str]:
    documents: list[str] = []
    problems: list[Problem] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        text, wrong = _text_of_json_line(line)
        if wrong:
            problems.append(
                Problem(f"{path}:{number}", wrong, allowed='one {"text": "..."} object per line')
            )
        else:
            documents.append(text)
    if len(problems) > MAX_LISTED:
        left = len(problems) - MAX_LISTED
        problems = [*problems[:MAX_LISTED], Problem(str(path), f"{left} more lines are wrong")]
    if problems:
        raise PlanError(problems)
    return documents


def _text_of_json_line(line: str) -> tuple[str, str]:
    """The text, or what is wrong with the line; one of the two is empty."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return "", f"is not JSON: {error.msg} at column {error.colno}"
    if not isinstance(value, dict):
        return "", f"is a JSON {type(value).__name__}, not an object"
    if "text" not in value:
        return "", f'has no key "text", only {sorted(value)}'
    text = value["text"]
    if not isinstance(text, str):
        return "", f'"text" is a {type(text).__name__}, not a string'
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f'"text" has half a surrogate pair at character {error.start}'
    return text, ""


def token_windows(
    texts: Sequence[str],
    encoder: TextEncoder,
    *,
    num_windows: int,
    seq_len: int,
    seed: int,
    what: str,
) -> TokenWindows:
    """Cut `texts` into windows of `seq_len` tokens and choose `num_windows` of them.

    The documents are encoded, joined with `encoder.separator` into one row and cut without overlap;
    each window is `encoder.prefix` followed by its piece; a remainder that fills no window is
    left out. Which windows are taken, and nothing else, depends on `seed`; they stay in text order.

    Args:
        what: how to call the text in an error, for example "calibration text".

    Raises:
        PlanError: the texts give fewer windows than asked, or `seq_len` has no room for text.
    """
    prefix = encoder.prefix
    piece_len = seq_len - len(prefix)
    if piece_len < 1:
        raise PlanError(
            Problem(
                what,
                f"seq_len {seq_len} has no room for text after {len(prefix)} prefix token(s)",
                allowed=f"at least {len(prefix) + 1}",
            )
        )
    stream = _token_stream(texts, encoder)
    num_available = len(stream) // piece_len
    if num_available < num_windows:
        raise PlanError(
            Problem(
                what,
                f"{len(stream)} tokens give {num_available} windows of {seq_len} tokens, "
                f"{num_windows} were asked for",
                allowed=f"at most {num_available} windows of this length",
                fix="give more text, or lower the number of windows or their length",
            )
        )
    pieces = stream[: num_available * piece_len].reshape(num_available, piece_len)
    chosen = _choose(num_available, num_windows, seed)
    prefixes = np.tile(np.asarray(prefix, np.int64), (num_windows, 1))
    return TokenWindows(
        tokens_WT=np.concatenate([prefixes, pieces[chosen]], axis=1),
        num_available=num_available,
        num_text_tokens=len(stream),
    )


def _token_stream(texts: Sequence[str], encoder: TextEncoder) -> NDArray[np.int64]:
    rows = [encoder.encode(text) + list(encoder.separator) for text in texts]
    return np.concatenate([np.asarray(row, np.int64) for row in rows] or [np.empty(0, np.int64)])


def _choose(num_available: int, num_chosen: int, seed: int) -> NDArray[np.int64]:
    """Indices in increasing order, the ones with the smallest hash.

    Not a random generator: its stream may change with the version of its library, and with it every
    artifact that was calibrated on the choice.
    """
    ranked = sorted(
        range(num_available), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()
    )
    return np.asarray(sorted(ranked[:num_chosen]), np.int64)
