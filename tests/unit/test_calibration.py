"""pipeline.quant.data and the tokenizer it is fed with."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, PlanError
from pipeline.quant.data import load_texts, token_windows
from pipeline.quant.source import SourceTokenizer
from tests.tiny_text import made_up_texts, write_tiny_tokenizer


class LetterEncoder:
    """One token per character; 0 begins a prompt, 1 separates documents."""

    prefix = (0,)
    separator = (1,)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_text_file_is_split_at_separator_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("one\n  <|endoftext|> inside\ntwo\x0c\n<|endoftext|>\n\n<|endoftext|>\nthree")
    assert load_texts(path) == ["one\n  <|endoftext|> inside\ntwo\x0c", "three"]


def test_separators_with_windows_line_ends_are_found(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"one\r\n<|endoftext|>\r\ntwo\r\n")
    assert load_texts(path) == ["one\r", "two\r\n"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\u2028still one", "id": 3}\n\n{"text": "  "}\n{"text": "two"}\n')
    assert load_texts(path) == ["one\u2028still one", "two"]


def test_invalid_utf8_is_located_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes("ü".encode() + b"abc\xff")
    with pytest.raises(PlanError, match=r"data\.txt: invalid UTF-8 at byte offset 5 \(0xff\)"):
        load_texts(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.txt: text data cannot be read: No such file"):
        load_texts(tmp_path / "none.txt")


def test_another_suffix_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"suffix '\.md'; allowed: \.txt, \.jsonl, \.csv, \.parquet"
    ):
        load_texts(tmp_path / "data.md")


@pytest.mark.parametrize("content", ["", " \n\n", "<|endoftext|>\n<|endoftext|>"])
def test_a_file_without_text_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.txt"
    path.write_text(content)
    with pytest.raises(PlanError, match="holds no text"):
        load_texts(path)


def test_every_wrong_json_line_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = ['{"text": "fine"}', "{", "[1]", '{"body": ""}', '{"text": 3}', '{"text": "\\ud800"}']
    path.write_text("\n".join(lines))
    with pytest.raises(PlanError) as caught:
        load_texts(path)
    listed = [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]
    allowed = '; allowed: one {"text": "..."} object per line'
    assert listed == [
        "2: is not JSON: Expecting property name enclosed in double quotes at column 2" + allowed,
        "3: is a JSON list, not an object" + allowed,
        "4: has no key \"text\", only ['body']" + allowed,
        '5: "text" is a int, not a string' + allowed,
        '6: "text" has half a surrogate pair at character 0' + allowed,
    ]


def test_a_file_of_wrong_lines_does_not_flood_the_screen(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("plain text\n" * 500)
    with pytest.raises(PlanError) as caught:
        load_texts(path)
    assert len(caught.value.problems) == 4
    assert str(caught.value.problems[-1]).endswith("497 more lines are wrong")


def test_windows_are_pieces_of_the_stream_after_the_prefix() -> None:
    windows = token_windows(
        ["abc", "defg"], LetterEncoder(), num_windows=3, seq_len=4, seed=0, what="text"
    )
    a = ord("a")
    assert windows.tokens_WT.tolist() == [
        [0, a, a + 1, a + 2],
        [0, 1, a + 3, a + 4],
        [0, a + 5, a + 6, 1],
    ]
    assert windows.tokens_WT.dtype == np.int64
    assert (windows.num_available, windows.num_text_tokens) == (3, 9)


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", min_codepoint=2), max_size=40), max_size=6),
    seq_len=st.integers(2, 12),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_any_choice_is_ordered_unpadded_and_without_repetition(
    texts: list[str], seq_len: int, seed: int, data: st.DataObject
) -> None:
    stream = [token for text in texts for token in [*map(ord, text), 1]]
    available = len(stream) // (seq_len - 1)
    chosen = data.draw(st.integers(0, available))
    windows = token_windows(
        texts, LetterEncoder(), num_windows=chosen, seq_len=seq_len, seed=seed, what="text"
    )
    pieces = [stream[at * (seq_len - 1) :][: seq_len - 1] for at in range(available)]
    position = 0
    for window in windows.tokens_WT.tolist():
        assert window[0] == 0
        position = pieces.index(window[1:], position) + 1  # a later piece than the one before
    assert windows.tokens_WT.shape == (chosen, seq_len)


def test_the_seed_and_nothing_else_changes_the_choice() -> None:
    def digest(seed: int) -> str:
        return token_windows(
            made_up_texts(5), LetterEncoder(), num_windows=9, seq_len=16, seed=seed, what="text"
        ).digest

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_the_digest_covers_the_cut_and_not_only_the_tokens() -> None:
    windows = token_windows(
        ["abcdefg"], LetterEncoder(), num_windows=2, seq_len=4, seed=0, what="text"
    )
    turned = type(windows)(windows.tokens_WT.reshape(4, 2), 4, 7)
    assert windows.digest != turned.digest
    tokens = [0, 97, 98, 99, 0, 100, 101, 102]
    assert windows.digest == hashlib.sha256(b"2x4:" + struct.pack("<8q", *tokens)).hexdigest()


def test_batches_cover_all_windows_in_order() -> None:
    windows = token_windows(
        ["abcdefghijk"], LetterEncoder(), num_windows=5, seq_len=3, seed=0, what="text"
    )
    batches = list(windows.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), windows.tokens_WT)


def test_too_little_text_is_an_error_with_the_numbers() -> None:
    with pytest.raises(PlanError) as caught:
        token_windows(
            ["abcdefgh"], LetterEncoder(), num_windows=4, seq_len=4, seed=0, what="held-out text"
        )
    assert str(caught.value) == (
        "held-out text: 9 tokens give 3 windows of 4 tokens, 4 were asked for; "
        "allowed: at most 3 windows of this length; "
        "fix: give more text, or lower the number of windows or their length"
    )


def test_a_window_without_room_for_text_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"seq_len 1 has no room .* allowed: at least 2"):
        token_windows(["abc"], LetterEncoder(), num_windows=1, seq_len=1, seed=0, what="text")


def test_the_tokenizer_of_a_checkpoint(tokenizer_dir: Path) -> None:
    tokenizer = SourceTokenizer(tokenizer_dir)
    assert tokenizer.prefix == (1,)
    assert tokenizer.separator == (2,)
    plain = tokenizer.encode("engine weight")
    assert not {0, 1, 2} & set(plain)


def test_text_that_reads_like_a_special_token_stays_text(tokenizer_dir: Path) -> None:
    tokenizer = SourceTokenizer(tokenizer_dir)
    assert not {1, 2} & set(tokenizer.encode("the tags <s> and </s> of HTML"))


def test_a_checkpoint_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer beside the weights; allowed: one of"):
        SourceTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', "[]"])
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer"):
        SourceTokenizer(tmp_path)


def test_reading_text_needs_no_heavy_import() -> None:
    code = (
        "import sys, pipeline.quant.data, pipeline.quant.quantizer, pipeline.verification;"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
