"""pipeline.quant.data.cleaning: each step alone, off by default, and counted."""

from __future__ import annotations

import pytest

from pipeline.calibration_config import CleanConfig
from pipeline.quant.data import Document, Message
from pipeline.quant.data.cleaning import (
    CleaningCounts,
    cleaned,
    count_duplicates,
    normalized_whitespace,
)


def _clean(texts: list[str], **options: object) -> tuple[list[str], dict[str, int]]:
    counts = CleaningCounts()
    documents = [Document("", text=text) for text in texts]
    kept = [each.text for each in cleaned(documents, CleanConfig(**options), counts)]
    return kept, {name: count for name, count in counts.to_dict().items() if count}


MESSY = ["see https://x.org/a  now", "see https://x.org/a  now", " \n\t", "SEE HTTPS x org a now!"]


def test_nothing_but_blanks_is_left_out_unless_asked() -> None:
    kept, counts = _clean(MESSY)
    assert kept == [MESSY[0], MESSY[1], MESSY[3]]
    assert counts == {"read": 3, "blank": 1, "kept": 3}


@pytest.mark.parametrize(
    ("text", "expected", "number"),
    [
        ("go to https://a.b/c?d=e&f=(g), then", "go to ), then", 1),
        ("(http://a.b/c).", "().", 1),
        ("www.example.org and ftp://x/y_z", " and ", 2),
        ("a.b.c and http:// alone", "a.b.c and http:// alone", 0),
        ("no url: httpserver.py, awww.x", "no url: httpserver.py, awww.x", 0),
    ],
)
def test_urls(text: str, expected: str, number: int) -> None:
    kept, counts = _clean([text], remove_urls=True)
    assert kept == [expected]
    assert counts.get("urls_removed", 0) == number


def test_a_document_of_nothing_but_a_url_is_emptied() -> None:
    kept, counts = _clean(["https://a.b"], remove_urls=True)
    assert (kept, counts["emptied"]) == ([], 1)


def test_white_space() -> None:
    assert normalized_whitespace("  a\u00a0\tb \r\n\r\n \n\n  c\n") == "a b\n\nc"
    kept, counts = _clean(["a  b", "a b"], normalize_whitespace=True)
    assert kept == ["a b", "a b"]
    assert counts["whitespace_changed"] == 1


def test_lengths_are_counted_after_cleaning() -> None:
    texts = ["abc", "ab   ", "abcdef"]
    kept, counts = _clean(texts, normalize_whitespace=True, min_chars=3, max_chars=5)
    assert kept == ["abc"]
    assert (counts["too_short"], counts["too_long"]) == (1, 1)


def test_exact_duplicates() -> None:
    kept, counts = _clean(["a", "b", "a", "A"], drop_duplicates="exact")
    assert kept == ["a", "b", "A"]
    assert counts["exact_duplicates"] == 1


def test_near_duplicates_differ_in_case_punctuation_space_and_numbers_only() -> None:
    texts = ["Page 12: The  END.", "page 7 - the end", "page 7 - the End", "page: the end", "end"]
    kept, counts = _clean([*texts, texts[0]], drop_duplicates="near")
    assert kept == [texts[0], texts[3], texts[4]]
    assert (counts["exact_duplicates"], counts["near_duplicates"]) == (1, 2)
    documents = [Document("", text=text) for text in [*texts, texts[0]]]
    assert count_duplicates(documents) == (1, 2)


def test_dialogues_are_cleaned_turn_by_turn() -> None:
    turns = (Message("user", "see https://a.b"), Message("assistant", "ok  then"))
    other = (Message("system", "see https://a.b"), Message("assistant", "ok  then"))
    documents = [Document("", messages=turns), Document("", messages=other)]
    options = CleanConfig(remove_urls=True, normalize_whitespace=True, drop_duplicates="exact")
    first, second = cleaned(documents, options, CleaningCounts())  # roles differ, so no duplicates
    assert first.messages == (Message("user", "see"), Message("assistant", "ok then"))
    assert second.messages is not None
    assert second.messages[0].role == "system"
