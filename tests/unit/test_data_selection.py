"""From files to windows: the demo's default choice, layouts and masks, and what the report says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.calibration_config import CalibrationConfig, CleanConfig
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.errors import PlanError
from pipeline.quant.data import (
    CalibrationData,
    Message,
    TextFile,
    calibration_data,
    load_documents,
    load_texts,
    token_windows,
)
from pipeline.quant.data.characters import character_distance, profile, script_distance
from pipeline.quant.data.report import CHARACTER_LIMIT
from pipeline.quant.data.report import comparison_warnings as profile_warnings
from pipeline.quant.source import SourceTokenizer
from tests.tiny_text import made_up_texts


class LetterEncoder:
    """One token per character; 0 begins a prompt, 1 separates documents."""

    prefix = (0,)
    separator = (1,)
    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def render(self, messages: Sequence[Message]) -> str:
        raise NotImplementedError

    def encode_rendered(self, text: str) -> list[int]:
        raise NotImplementedError


def _source(tmp_path: Path, texts: list[str]) -> TextFile:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextFile(path)


def _data(tmp_path: Path, texts: list[str], **options: object) -> CalibrationData:
    config = CalibrationConfig(**{"num_samples": 2, "seq_len": 8, **options})
    return calibration_data(_source(tmp_path, texts), LetterEncoder(), config, vocab_size=200)


def test_the_demos_windows_are_those_of_every_version() -> None:
    """Figures of different versions are comparable only while these digests stay.

    Recorded from the first version's own code, before there were other strategies and layouts.
    """
    encoder = SourceTokenizer(MODEL_DIR)
    data = calibration_data(
        TextFile(CALIBRATION_PATH), encoder, CalibrationConfig(num_samples=64), vocab_size=4096
    )
    calibrated = "4ff86b758fb986c4c12b8668adbe78352dbdaa2ac719dd5dcf45ad9e890e6873"
    assert data.windows.digest == calibrated
    assert data.windows.mask_WT is None
    assert data.report["tokens_sha256"] == calibrated
    heldout = token_windows(
        load_texts(HELDOUT_PATH), encoder, num_windows=64, seq_len=256, seed=0, what="held-out"
    )
    assert heldout.digest == "7cb7ca57802518278b061e70c14d46b749fa3146eacc7d0a2f41846d93aa8558"


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_windows_hold_one_document_each_and_mask_the_rest(
    tmp_path: Path, padding: str
) -> None:
    texts = ["abc", "defghijklm", "nopqrst"]
    data = _data(tmp_path, texts, num_samples=3, layout="padded", padding=padding)
    windows = data.windows
    assert windows.mask_WT is not None
    assert windows.mask_WT.dtype == bool
    real = [
        "".join(map(chr, tokens[mask][1:]))
        for tokens, mask in zip(windows.tokens_WT, windows.mask_WT, strict=True)
    ]
    assert real == ["abc", "defghij", "nopqrst"]  # the second is cut, the third just fits
    assert windows.mask_WT.sum(axis=1).tolist() == [4, 8, 8]
    shown = windows.mask_WT[0].tolist()
    assert shown == ([True] * 4 + [False] * 4)[:: 1 if padding == "right" else -1]
    assert set(windows.tokens_WT[~windows.mask_WT].tolist()) == {1}  # an id that the model has
    assert windows.num_tokens == 20
    assert data.report["documents"]["truncated"] == 1
    assert data.report["num_tokens"] == 20


def test_padding_is_a_part_of_the_digest(tmp_path: Path) -> None:
    texts = ["abc", "defghijklm"]
    right, left = (
        _data(tmp_path, texts, layout="padded", padding=side).windows for side in ("right", "left")
    )
    assert right.digest != left.digest
    unmasked = type(right)(right.tokens_WT, right.num_available, right.num_text_tokens)
    assert unmasked.digest != right.digest


def test_padded_windows_that_are_all_full_need_no_mask(tmp_path: Path) -> None:
    windows = _data(tmp_path, ["abcdefg", "abcdefgh"], layout="padded").windows
    assert windows.mask_WT is None
    assert windows.num_tokens == 16


def test_the_same_texts_from_any_kind_of_file_are_the_same_windows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {index}, with a comma" for index in range(20)]
    (tmp_path / "data.txt").write_text("\n<|endoftext|>\n".join(texts))
    (tmp_path / "data.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "data.parquet")
    _source(tmp_path, texts)
    options = CalibrationConfig(num_samples=5, seq_len=32)
    digests = {
        calibration_data(
            TextFile(tmp_path / f"data.{suffix}"), LetterEncoder(), options, vocab_size=200
        ).windows.digest
        for suffix in ("txt", "jsonl", "csv", "parquet")
    }
    assert len(digests) == 1


def test_too_few_documents_for_padded_windows(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"6 tokens give 2 windows of 8 tokens, 3 were asked for"):
        _data(tmp_path, ["abc", "def"], num_samples=3, layout="padded")


def test_cleaning_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"cleaning left none of its 2 documents; fix: loosen `clean"
    ):
        _data(tmp_path, ["abc", "def"], clean=CleanConfig(min_chars=9))


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    texts = ["aaaa", "aaaa", "AAAA!", "bcdefgh", "  "]
    report = _data(tmp_path, texts, num_samples=2, seq_len=8).report
    assert report["documents"] == {
        "read": 4,
        "blank": 1,
        "null": 0,
        "urls_removed": 0,
        "whitespace_changed": 0,
        "emptied": 0,
        "too_short": 0,
        "too_long": 0,
        "exact_duplicates": 0,
        "near_duplicates": 0,
        "kept": 4,
        "encoded": 4,
        "truncated": 0,
        "repeated_exactly": 1,
        "repeated_nearly": 1,
    }
    assert (report["num_windows"], report["num_windows_available"]) == (2, 3)
    assert (report["num_tokens"], report["num_text_tokens"]) == (16, 24)
    lengths = report["document_tokens"]
    assert lengths == {
        "edges": [0, 1, 2, 4, 8],
        "counts": [0, 0, 0, 4],
        "mean": 5.0,
        "median": 4.5,
        "longest": 7,
    }
    json.dumps(report, allow_nan=False)


def test_rare_tokens_and_coverage(tmp_path: Path) -> None:
    """159 times x, once each of y and z in different pieces, 4 separators: all but x is rare."""
    texts = ["x" * 99, "yxxxxx", "zxxxxx", "x" * 50]
    random, diverse = (
        _data(tmp_path, texts, num_samples=2, strategy=strategy).report["vocabulary"]
        for strategy in ("random", "diverse")
    )
    assert diverse["rare"]["ids_covered"] == diverse["rare"]["ids"] == 3
    assert diverse["rare"]["share_available"] == round(5 / 161, 6)  # of 23 pieces of 7
    assert random["rare"]["ids_covered"] < 3
    assert diverse["distinct"] == 4  # x, y, z and the separator
    assert diverse["coverage"] == round(4 / 200, 6)


def test_warnings_of_a_doubtful_set(tmp_path: Path) -> None:
    texts = ["same again and again"] * 5 + ["other"]
    assert _data(tmp_path, texts, num_samples=2, layout="padded").warnings == (
        "2 samples are few: 128 to 1000 are usual",
        "samples are short: 8 tokens on average, less than 64",
        "5 of 6 documents are longer than seq_len 8; only their beginnings are used",
        "4 of 6 documents repeat another one (4 exactly); `clean: {drop_duplicates: near}` drops them",
    )


def test_a_good_set_has_no_warnings(tmp_path: Path) -> None:
    assert _data(tmp_path, made_up_texts(100), num_samples=128, seq_len=96).warnings == ()


def comparison_warnings(calibration: list[str], heldout: list[str]) -> Iterator[str]:
    return profile_warnings(profile(calibration), profile(heldout))


RUSSIAN = (
    "Правительство хочет потратить больше денег на школы. Многие родители надеются, что классы "
    "станут меньше и у детей будет больше времени с учителями. Вечером мы долго сидели у реки. "
)
ENGLISH = (
    "The government wants to spend more money on schools next year. Many parents hope that classes "
    "will become smaller and that the children will have more time with their teachers. In the "
    "cities there are not enough rooms, in the country not enough people who want to teach. Nobody "
    "knows how long the work will take, but everyone agrees that it is needed. In the evening we sat "
    "by the river for a long time and told each other stories of when our grandparents were young. "
)
GERMAN = (
    "Die Regierung will im kommenden Jahr mehr Geld für den Ausbau der Schulen ausgeben. Viele Eltern "
    "hoffen, dass die Klassen kleiner werden und die Kinder mehr Zeit mit ihren Lehrern haben. In den "
    "Städten fehlt es an Räumen, auf dem Land an Menschen, die unterrichten wollen. Niemand weiß "
    "genau, wie lange der Umbau dauert, aber alle sind sich einig, dass er nötig ist. Am Abend saßen "
    "wir noch lange am Fluss und erzählten uns Geschichten aus der Zeit unserer Großeltern. "
)


def test_another_script_is_noticed() -> None:
    (warning,) = comparison_warnings([RUSSIAN * 20], [ENGLISH * 20])
    assert warning == (
        "the calibration text is 100% Cyrillic, the held-out text 100% Latin: scales are chosen on "
        "one script and judged on another"
    )
    mixed = [RUSSIAN * 20, ENGLISH * 4]
    (warning,) = comparison_warnings(mixed, [ENGLISH * 20])
    assert re.search(r"is 6\d% Cyrillic and 3\d% Latin, the held-out text 100% Latin", warning)


@pytest.mark.parametrize("kinds", ["code against prose", "German against English"])
def test_another_kind_of_text_is_noticed(kinds: str) -> None:
    prose = (MODEL_DIR / "LICENSE-python.txt").read_text("utf-8")
    pairs = {
        # 0.065 bits
        "code against prose": (load_texts(CALIBRATION_PATH), [prose * 2]),
        # 0.086 bits
        "German against English": ([GERMAN * 40], [ENGLISH * 40]),
    }
    calibration, heldout = pairs[kinds]
    assert 0.06 < character_distance(profile(calibration), profile(heldout)) < 0.1
    (warning,) = comparison_warnings(calibration, heldout)
    assert "differ in their characters" in warning
    assert list(comparison_warnings(heldout, heldout)) == []


def test_texts_of_one_kind_are_alike() -> None:
    calibration, heldout = load_texts(CALIBRATION_PATH), load_texts(HELDOUT_PATH)
    # 0.0023 bits
    assert character_distance(profile(calibration), profile(heldout)) < CHARACTER_LIMIT / 10
    assert list(comparison_warnings(calibration, heldout)) == []


def test_texts_too_short_to_tell_are_not_judged() -> None:
    assert list(comparison_warnings([RUSSIAN], [ENGLISH])) == []
    assert list(comparison_warnings([GERMAN * 20], [ENGLISH * 20])) == []  # enough for scripts only
    assert list(comparison_warnings([], [ENGLISH * 40])) == []


def test_scripts() -> None:
    text = "Latin кириллица 漢字 ひらがな カタカナ ｆｕｌｌ ελ עב 12.5 µ𝐱"
    shares = profile([text]).scripts()
    counts = {name: round(share * 32) for name, share in shares.items()}
    assert counts == {
        "Cyrillic": 9,
        "Latin": 9,
        "Hiragana": 4,
        "Katakana": 4,
        "Han": 2,
        "Greek": 2,
        "Hebrew": 2,
    }
    kinds = profile(["ab 1!"]).kinds()
    assert kinds == {"letters": 0.4, "digits": 0.2, "whitespace": 0.2, "other": 0.2}
    assert script_distance(profile(["aб"]), profile(["ab"])) == 0.5
    assert profile(["12"]).scripts() == {}


def test_a_sample_of_a_large_held_out_text_is_enough(tmp_path: Path) -> None:
    source = _source(tmp_path, [f"text {index}" for index in range(1000)])
    some = load_documents(source, max_chars=500)
    assert 500 <= sum(len(each.text) for each in some) < 510
    assert np.all(np.diff([int(each.text.split()[1]) for each in some]) > 0)
