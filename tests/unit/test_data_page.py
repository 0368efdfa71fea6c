"""`trtpipe data`: the windows that quantizing will use, before anything is quantized."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.quant.data import TextEncoder, load_texts
from pipeline.quant.light_tokenizer import LightTokenizer, encoder_of
from pipeline.quant.source import SourceTokenizer
from tests.build_config import write_build
from tests.tiny_text import write_tiny_tokenizer

DEMO = "model: {source: demo}\n"
BODY = "data: a.jsonl, column: body"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _page(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", "x.yaml", *arguments]) == 0
    return capsys.readouterr().out


def test_the_demos_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "x.yaml").write_text(f"{DEMO}quantize: {{calibration: {{num_samples: 64}}}}\n")
    page = _page(capsys)
    assert page.startswith(
        "calibration data: bundled\nsamples     64 of 274 windows of 256 tokens, "
    )
    assert "sha256      4ff86b758fb986c4c12b8668adbe78352dbdaa2ac719dd5dcf45ad9e890e6873\n" in page
    assert "scripts     Latin 100.0%\n" in page
    assert "\n      512 to 1023         12 ####" in page
    assert "\nwarning: 64 samples are few: 128 to 1000 are usual\n" in page
    assert page.count("\n--- sample ") == 3
    document = json.loads(_page(capsys, "--json"))
    assert document["source"] == "bundled"
    assert document["calibration"]["num_windows"] == 64
    assert len(document["samples"]) == 3
    assert not (here / "engines").exists()


def test_it_needs_no_torch(here: Path) -> None:
    (here / "x.yaml").write_text(DEMO)
    code = (
        "import sys; from pipeline.cli import main; assert main(['data', 'x.yaml']) == 0;"
        "assert not {'torch', 'transformers', 'pyarrow', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_warnings_of_the_comparison_with_the_held_out_text(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"body": "Слова на другом языке, \x1b[31m другими буквами. " * 40})] * 9
    (here / "a.jsonl").write_text("\n".join(lines))
    section = "{data: a.jsonl, column: body, num_samples: 20, seq_len: 64}"
    (here / "x.yaml").write_text(f"{DEMO}quantize: {{calibration: {section}}}\n")
    page = _page(capsys)
    assert page.startswith("calibration data: a.jsonl, body\n")
    assert (
        "warning: the calibration text is 97% Cyrillic and 3% Latin, the held-out text 100% "
        in page
    )
    assert "warning: 8 of 9 documents repeat another one (8 exactly)" in page
    assert "\x1b" not in page  # texts of strangers do not reach the terminal as they are
    assert "\\x1b[31m" in page


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (f"{DEMO}quantize: {{format: fp16}}\n", 2, "fp16 is not quantized, so it needs no"),
        (
            f"{DEMO}quantize: {{calibration: {{data: a.jsonl, column: bod}}}}\n",
            2,
            "x.yaml:2: quantize.calibration.column: ",
        ),
        (
            "model: {source: hub, id: a/b, revision: '" + "0" * 40 + "'}\n",
            2,
            "x.yaml:1: model: the model is not fetched yet, so there is no tokenizer",
        ),
        (
            f"{DEMO}quantize: {{calibration: {{{BODY}, num_samples: 1, seq_len: 8}}}}\n",
            2,
            "a.jsonl: 3 tokens give 0 windows of 8 tokens, 1 were asked for",
        ),
        (
            f"{DEMO}quantize: {{calibration: {{data: a.jsonl, column: body}}}}\n",
            2,
            "a.jsonl: holds 10 bytes of text, 128 windows of 256 tokens need 32768 tokens",
        ),
        (
            f"{DEMO}quantize: {{calibration: {{num_samples: 300}}}}\n",
            2,
            "x.yaml:2: quantize.calibration.data: ",
        ),
    ],
)
def test_mistakes(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, expected: str
) -> None:
    (here / "a.jsonl").write_text('{"body": "short text"}\n')
    (here / "x.yaml").write_text(text)
    assert main(["data", "x.yaml"]) == code
    assert expected in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_the_weights(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_build(here, fmt="int4_awq")
    fields = json.loads((here / "weights" / "config.json").read_text())
    fields["vocab_size"] = 64
    (here / "weights" / "config.json").write_text(json.dumps(fields))
    assert main(["data", str(config)]) == 3
    assert "embeddings" in capsys.readouterr().err


def _assert_same(light: TextEncoder, full: SourceTokenizer, texts: list[str]) -> None:
    assert isinstance(light, LightTokenizer)
    assert (light.prefix, light.separator) == (full.prefix, full.separator)
    for text in texts:
        ids = full.encode(text)
        assert light.encode(text) == ids
        assert light.decode([*full.prefix, *ids]) == full.decode([*full.prefix, *ids])


def test_the_light_tokenizer_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    texts = [
        *load_texts(CALIBRATION_PATH),
        *load_texts(HELDOUT_PATH),
        "</s> <s> \u00fc\U0001f600\n",
    ]
    full = SourceTokenizer(MODEL_DIR)
    _assert_same(encoder_of(MODEL_DIR, dialogues=False), full, texts)
    write_tiny_tokenizer(tmp_path)
    _assert_same(encoder_of(tmp_path, dialogues=False), SourceTokenizer(tmp_path), texts[-3:])


@pytest.mark.parametrize(
    "change", [{"add_bos_token": True}, {"tokenizer_class": "LlamaTokenizerFast"}, None]
)
def test_other_tokenizers_go_through_transformers(
    tmp_path: Path, change: dict[str, object] | None
) -> None:
    write_tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(change or {})}))
    encoder = encoder_of(tmp_path, dialogues=change is None)
    assert isinstance(encoder, SourceTokenizer)
