"""Pieces joined are the text, for any text, any cut and any tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.runtime.detokenizer import IncrementalDetokenizer, StopWordFilter
from tests.triton.tokenizers_for_tests import KINDS

text = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(
    st.sampled_from(" \n\tThe dogé🙂日👩\u200d\u0301\ufffd."), max_size=40
)


@functools.cache
def _tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


def _decode(kind: str, ids: Sequence[int]) -> str:
    return _tokenizer(kind).decode(list(ids), skip_special_tokens=True)


def _pieces(kind: str, prompt: Sequence[int], output: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(lambda ids: _decode(kind, ids), prompt)
    return [*(detokenizer.push(token) for token in output), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=text, output=text)
def test_text_comes_back_whole(kind: str, prompt: str, output: str) -> None:
    encode = _tokenizer(kind).encode
    prompt_ids, output_ids = encode(prompt).ids, encode(output, add_special_tokens=False).ids
    pieces = _pieces(kind, prompt_ids, output_ids)
    whole = _decode(kind, [*prompt_ids, *output_ids])
    assert (_decode(kind, prompt_ids) + "".join(pieces)).rstrip("\ufffd") == whole.rstrip("\ufffd")


@given(
    prompt=st.lists(st.integers(0, 419), max_size=12),
    output=st.lists(st.integers(0, 430), max_size=40),
)
def test_any_byte_level_tokens_give_what_decode_gives(prompt: list[int], output: list[int]) -> None:
    before = _decode("byte_level", prompt)
    if before.endswith("\ufffd"):  # a prompt that ends inside a character: its text is not a prefix
        prompt, before = [], ""
    pieces = _pieces("byte_level", prompt, output)
    whole = _decode("byte_level", [*prompt, *output])
    assert (before + "".join(pieces)).rstrip("\ufffd") == whole.rstrip("\ufffd")
    assert not pieces or not pieces[-1].endswith("\ufffd")


def _byte_fallback_text(ids: Sequence[int]) -> str:
    """Text of byte-fallback tokens, written down from the rule instead of the library's decoder.

    Within a run of byte tokens, characters appear as soon as they are complete; what is not complete
    when the run ends becomes one U+FFFD per byte, and nothing at the very end.
    """
    result, pending = "", b""
    for token in (_tokenizer("byte_fallback").id_to_token(index) for index in ids):
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            pending += bytes([int(match[1], 16)])
            try:
                result += pending.decode("utf-8")
                pending = b""
            except UnicodeDecodeError:
                continue
        else:
            result += "\ufffd" * len(pending) + token.replace("▁", " ")
            pending = b""
    return result


@given(output=st.lists(st.integers(3, 409), max_size=40))
@example(output=[3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xE2, 300])
@example(output=[3 + 0x80, 3 + 0x00])
def test_any_byte_fallback_tokens_follow_the_rule(output: list[int]) -> None:
    anchor = _tokenizer("byte_fallback").token_to_id("▁The")
    assert "".join(_pieces("byte_fallback", [anchor], output)) == _byte_fallback_text(output)


def _stop_position(words: Sequence[str], whole: str) -> int | None:
    for end in range(len(whole) + 1):
        complete = [len(word) for word in words if whole[:end].endswith(word)]
        if complete:
            return end - max(complete)
    return None


@given(
    words=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab c", max_size=5), max_size=12),
)
def test_stop_words_end_the_text_at_the_first_complete_word(
    words: list[str], pieces: list[str]
) -> None:
    stop = StopWordFilter(words)
    released = ""
    whole = "".join(pieces)
    position = _stop_position(words, whole)
    for piece in pieces:
        released += stop.push(piece)
        assert whole[: position if position is not None else len(whole)].startswith(released)
    assert stop.stopped == (position is not None)
    if not stop.stopped:
        released += stop.finish()
    assert released == whole[:position]
