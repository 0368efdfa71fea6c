"""From a text file to the windows that calibrate or measure a model.

A text is cut the way the model will be used: every window begins like a prompt (with the tokenizer's
prefix, usually the begin-of-sequence token). Packed windows are full: documents follow each other with
the end-of-sequence token between them, so no pad token can enter a statistic. Padded windows hold the
beginning of one document each, and a mask.

Shape suffixes: W windows, T tokens of one window, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration_config import CalibrationConfig
from pipeline.errors import PlanError, Problem
from pipeline.quant.data.candidates import (
    Candidates,
    one_per_document,
    packed,
    pool,
    pool_chars,
    room_for_text,
)
from pipeline.quant.data.characters import Profile, profile
from pipeline.quant.data.cleaning import CleaningCounts, cleaned
from pipeline.quant.data.documents import Document, TextFile
from pipeline.quant.data.encoding import DialogueEncoder, TextEncoder, check_chat_template
from pipeline.quant.data.readers import documents
from pipeline.quant.data.report import describe
from pipeline.quant.data.strategies import choose
from pipeline.quant.data.windows import TokenWindows

CALIBRATION_TEXT = "calibration text"


@dataclass(frozen=True)
class CalibrationData:
    """What a model is calibrated on, and what there is to know about it.

    Attributes:
        windows: the tokens.
        report: plain data for quant_report.json, the warnings among it.
        characters: of the windows' text, without the prefixes.
    """

    windows: TokenWindows
    report: dict[str, Any]
    characters: Profile

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is doubtful about the set."""
        return tuple(self.report["warnings"])


def calibration_data(
    source: TextFile, encoder: DialogueEncoder, options: CalibrationConfig, *, vocab_size: int
) -> CalibrationData:
    """Read, clean, encode, choose, lay out and describe; the same for the same arguments.

    Args:
        vocab_size: embeddings of the model, for the coverage in the report.

    Raises:
        PlanError: the file cannot be read or holds too little, a row is wrong, or the tokenizer has no
            chat template for dialogues.
        ToolError: a Parquet file without pyarrow.
    """
    if source.messages is not None:
        check_chat_template(encoder, CALIBRATION_TEXT)
    counts = CleaningCounts()
    kept = _pool(source, options, counts)
    piece_len = room_for_text(encoder, options.seq_len, CALIBRATION_TEXT)
    form = packed if options.layout == "packed" else one_per_document
    candidates = form(kept, encoder, piece_len)
    check_enough(candidates, options.num_samples, options.seq_len, CALIBRATION_TEXT)
    chosen_C = choose(candidates, options.num_samples, options.strategy, options.seed)
    windows = _windows(candidates, chosen_C, encoder, options.seq_len, options.padding)
    if options.layout == "packed":
        assert windows.mask_WT is None
    characters = profile(encoder.decode(candidates.pieces[index].tolist()) for index in chosen_C)
    report = describe(
        windows, candidates, chosen_C, kept, counts, characters, options, vocab_size=vocab_size
    )
    return CalibrationData(windows, report, characters)


def _pool(source: TextFile, options: CalibrationConfig, counts: CleaningCounts) -> list[Document]:
    def count_null() -> None:
        counts.null += 1

    read = documents(source, on_null=count_null if options.clean.drop_null else None)
    max_chars = pool_chars(options.num_samples, options.seq_len)
    kept = pool(cleaned(read, options.clean, counts), options.seed, max_chars)
    if not kept and counts.read:
        raise PlanError(cleaned_away(source.path, counts.read))
    if not kept:
        raise PlanError(no_text(source.path))
    return kept


def load_documents(source: TextFile, max_chars: int | None = None) -> list[Document]:
    """The documents of a file; those that hold only white space are left out.

    Args:
        max_chars: a sample of about this many characters is enough (`candidates.pool`).

    Raises:
        PlanError: see `readers.documents`; also no document at all.
    """
    filled = (document for document in documents(source) if document.content.strip())
    loaded = list(filled) if max_chars is None else pool(filled, 0, max_chars)
    if not loaded:
        raise PlanError(no_text(source.path))
    return loaded


def load_texts(path: Path) -> list[str]:
    """The texts of a file in the default column.

    Raises:
        PlanError: see `load_documents`.
    """
    return [document.text for document in load_documents(TextFile(path))]


def cleaned_away(path: Path, number: int) -> Problem:
    """The problem of a file whose documents `clean:` drops, all of them."""
    what = f"cleaning left none of its {number} documents"
    return Problem(str(path), what, fix="loosen `clean:`")


def no_text(path: Path) -> Problem:
    """The problem of a file without a document."""
    return Problem(str(path), "holds no text", fix="give a file with at least one document")


def token_windows(
    texts: Iterable[str | Document],
    encoder: TextEncoder,
    *,
    num_windows: int,
    seq_len: int,
    seed: int,
    what: str,
) -> TokenWindows:
    """Packed windows of `seq_len` tokens, `num_windows` of them chosen at random.

    The documents are encoded, joined with `encoder.separator` into one row and cut without overlap;
    each window is `encoder.prefix` followed by its piece; a remainder that fills no window is
    left out. Which windows are taken, and nothing else, depends on `seed`; they stay in text order.

    Args:
        what: how to call the text in an error, for example "calibration text".

    Raises:
        PlanError: the texts give fewer windows than asked, or `seq_len` has no room for text.
    """
    piece_len = room_for_text(encoder, seq_len, what)
    listed = (Document(what, text=text) if isinstance(text, str) else text for text in texts)
    candidates = packed(listed, encoder, piece_len)
    check_enough(candidates, num_windows, seq_len, what)
    chosen_C = choose(candidates, num_windows, "random", seed)
    return _windows(candidates, chosen_C, encoder, seq_len, "right")


def check_enough(candidates: Candidates, wanted: int, seq_len: int, what: str) -> None:
    """Raise PlanError when a text called `what` gives fewer than `wanted` windows."""
    available = len(candidates.pieces)
    if available < wanted:
        raise PlanError(
            Problem(
                what,
                f"{candidates.num_tokens} tokens give {available} windows of {seq_len} tokens, "
                f"{wanted} were asked for",
                allowed=f"at most {available} windows of this length",
                fix="give more text, or lower the number of windows or their length",
            )
        )


def _windows(
    candidates: Candidates,
    chosen_C: NDArray[np.int64],
    encoder: TextEncoder,
    seq_len: int,
    padding: str,
) -> TokenWindows:
    """Prefix and piece, and the mask where a piece does not fill its window."""
    # Any id that the model has would do: nothing is measured at its places.
    pad_id = (*encoder.separator, 0)[0]
    tokens_WT = np.full((len(chosen_C), seq_len), pad_id, np.int64)
    mask_WT = np.zeros((len(chosen_C), seq_len), bool)
    prefix = np.asarray(encoder.prefix, np.int64)
    for row, index in enumerate(chosen_C):
        ids = np.concatenate([prefix, candidates.pieces[index]])
        where = slice(len(ids)) if padding == "right" else slice(seq_len - len(ids), seq_len)
        tokens_WT[row, where] = ids
        mask_WT[row, where] = True
    return TokenWindows(
        tokens_WT=tokens_WT,
        num_available=len(candidates.pieces),
        num_text_tokens=candidates.num_tokens,
        mask_WT=None if mask_WT.all() else mask_WT,
    )


def decoded(windows: TokenWindows, encoder: DialogueEncoder, limit: int) -> Sequence[str]:
    """Text of the first `limit` windows, special tokens included, padding not."""
    masks = np.ones(windows.tokens_WT.shape, bool) if windows.mask_WT is None else windows.mask_WT
    rows = list(zip(windows.tokens_WT, masks, strict=True))[:limit]
    return [encoder.decode(tokens[mask].tolist()) for tokens, mask in rows]
