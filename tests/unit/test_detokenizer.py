"""Text pieces: characters over several tokens, spaces at borders, stop words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from pipeline.runtime.detokenizer import IncrementalDetokenizer, StopWordFilter
from tests.triton.tokenizers_for_tests import KINDS


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(lambda part: _decode(tokenizer, part), prompt_ids)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", range(1, 9))
def test_spaces_at_the_border_of_prompt_and_output(kind: str, cut: int) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("The dog  and the\nlazy fox is").ids
    prompt, output = ids[:cut], ids[cut:]
    assert _decode(tokenizer, prompt) + "".join(_pieces(tokenizer, output, prompt)) == _decode(
        tokenizer, ids
    )


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_over_four_tokens_comes_in_one_piece(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("x\U0001f9ffy", add_special_tokens=False).ids  # not in the training text
    pieces = _pieces(tokenizer, ids)
    assert "\U0001f9ff" in pieces
    assert "".join(pieces) == "x\U0001f9ffy"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_cut_by_the_end_is_dropped(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode("x\U0001f9ff", add_special_tokens=False).ids
    assert "".join(_pieces(tokenizer, ids[:-1])) == "x"


def test_invalid_bytes_in_the_middle_show_as_the_decoder_shows_them() -> None:
    tokenizer = KINDS["byte_level"]()
    lone = tokenizer.encode("é", add_special_tokens=False).ids[:1]
    ids = [*lone, *tokenizer.encode(" dog", add_special_tokens=False).ids]
    text = "".join(_pieces(tokenizer, ids))
    assert text == _decode(tokenizer, ids)


def test_byte_fallback_keeps_what_was_already_shown() -> None:
    """The library turns a whole run of byte tokens into U+FFFD when its end is invalid."""
    tokenizer = KINDS["byte_fallback"]()
    euro = [tokenizer.token_to_id(f"<0x{value:02X}>") for value in "€".encode()]
    ids = [*euro, euro[0], tokenizer.token_to_id("T")]
    assert _decode(tokenizer, ids) == "\ufffd\ufffd\ufffd\ufffdT"
    assert _pieces(tokenizer, ids) == ["", "", "€", "", "\ufffdT", ""]


def test_special_tokens_leave_no_text_and_swallow_no_space() -> None:
    tokenizer = KINDS["byte_fallback"]()
    the, bos, dog = (tokenizer.token_to_id(token) for token in ("▁The", "<s>", "▁dog"))
    assert "".join(_pieces(tokenizer, [bos, dog], [bos, the])) == " dog"
    assert "".join(_pieces(tokenizer, [bos] * 12 + [dog], [the])) == " dog"


def test_a_prompt_of_special_tokens_only_begins_the_text() -> None:
    tokenizer = KINDS["byte_fallback"]()
    bos, dog = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁dog")
    assert "".join(_pieces(tokenizer, [dog], [bos] * 12)) == "dog"


def test_an_id_outside_the_vocabulary_is_no_text() -> None:
    tokenizer = KINDS["byte_level"]()
    ids = [*tokenizer.encode("dog", add_special_tokens=False).ids, 10_000]
    assert "".join(_pieces(tokenizer, ids)) == "dog"


def _filtered(words: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], bool]:
    stop = StopWordFilter(words)
    released = [stop.push(piece) for piece in pieces]
    if not stop.stopped:
        released.append(stop.finish())
    return released, stop.stopped


def test_no_stop_words_withhold_nothing() -> None:
    assert _filtered([], ["a", "b"]) == (["a", "b", ""], False)


def test_a_stop_word_over_several_pieces_never_shows_its_beginning() -> None:
    assert _filtered(["\nEND"], ["one", " two\n", "E", "ND more"]) == (
        ["one", " two", "", ""],
        True,
    )


def test_a_false_start_is_released_with_what_follows() -> None:
    assert _filtered(["STOP"], ["a ST", "ART"]) == (["a ", "START", ""], False)


def test_the_end_releases_what_was_withheld() -> None:
    assert _filtered(["STOP"], ["a STO"]) == (["a ", "STO"], False)


def test_a_beginning_inside_a_beginning() -> None:
    assert _filtered(["aab"], ["a", "a", "a", "b", "c"]) == (["", "", "a", "", ""], True)


@pytest.mark.parametrize(
    ("words", "text", "kept"),
    [
        (["abcd", "bc"], "xabcd", "xa"),  # bc is complete first
        (["abc", "bc"], "xabcd", "x"),  # complete together: the longer one
        (["fox", "dog"], "a dog, a fox", "a "),
        (["日本"], "これは日本です", "これは"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_which_stop_word_wins_does_not_depend_on_the_pieces(
    words: list[str], text: str, kept: str, size: int
) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    released, stopped = _filtered(words, pieces)
    assert ("".join(released), stopped) == (kept, True)


def test_nothing_is_released_after_the_stop() -> None:
    stop = StopWordFilter(["x"])
    assert stop.push("ax") == "a"
    assert stop.push("more") == ""
    assert stop.finish() == ""
