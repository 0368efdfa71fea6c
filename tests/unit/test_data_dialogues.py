"""Dialogues through a real tokenizer's chat template, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.calibration_config import CalibrationConfig
from pipeline.errors import PlanError
from pipeline.quant.data import (
    CalibrationData,
    Document,
    Message,
    TextFile,
    calibration_data,
    load_documents,
    token_windows,
)
from pipeline.quant.data.encoding import encode_document
from pipeline.quant.data.preflight import has_template
from pipeline.quant.source import SourceTokenizer
from tests.tiny_text import write_tiny_tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}"
    "{% endif %}{{ m.role }}: {{ m.content.strip() }}{{ eos_token }}{% endfor %}"
)
FORGETFUL = "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def _tokenizer_dir(directory: Path, template: str | None) -> Path:
    write_tiny_tokenizer(directory)
    if template is not None:
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "chat_template": template}))
    return directory


def _dialogue(*turns: tuple[str, str]) -> Document:
    return Document("talk.jsonl:1", messages=tuple(Message(*turn) for turn in turns))


def test_the_template_is_rendered_and_its_special_tokens_are_tokens(tmp_path: Path) -> None:
    encoder = SourceTokenizer(_tokenizer_dir(tmp_path, PLAIN))
    ids = encode_document(_dialogue(("user", " scale"), ("assistant", "the layer")), encoder)
    # <s> and the last </s> are what the window adds anyway; the </s> between the turns stays.
    expected = [*encoder.encode("user: scale"), 2, *encoder.encode("assistant: the layer")]
    assert ids == expected


def test_an_unknown_role_is_named_with_its_line(tmp_path: Path) -> None:
    encoder = SourceTokenizer(_tokenizer_dir(tmp_path, PLAIN))
    with pytest.raises(PlanError) as caught:
        encode_document(_dialogue(("robot", "beep")), encoder)
    assert str(caught.value) == (
        "talk.jsonl:1: the chat template refuses the dialogue: unknown role robot; allowed: roles "
        "and an order of turns that the model's template knows; fix: its roles are robot"
    )


def test_a_role_that_the_template_leaves_out_is_an_error(tmp_path: Path) -> None:
    encoder = SourceTokenizer(_tokenizer_dir(tmp_path, FORGETFUL))
    assert encode_document(_dialogue(("user", "a"), ("other", "b")), encoder)
    with pytest.raises(PlanError, match=r"leaves out messages of role 'tool'; fix: rename"):
        encode_document(_dialogue(("user", "a"), ("tool", "b c")), encoder)


def _write_talk(path: Path, number: int, role: str = "user") -> TextFile:
    turns = [
        [{"role": role, "content": f"weight {index}"}, {"role": "assistant", "content": "scale"}]
        for index in range(number)
    ]
    path.write_text("".join(json.dumps({"talk": each}) + "\n" for each in turns))
    return TextFile(path, messages="talk")


def _data(tmp_path: Path, template: str | None, role: str = "user") -> CalibrationData:
    source = _write_talk(tmp_path / "talk.jsonl", 30, role)
    encoder = SourceTokenizer(_tokenizer_dir(tmp_path, template))
    options = CalibrationConfig(messages="talk", num_samples=8, seq_len=16)
    return calibration_data(source, encoder, options, vocab_size=512)


def test_windows_of_dialogues_are_of_their_rendered_text(tmp_path: Path) -> None:
    data = _data(tmp_path, PLAIN)
    encoder = SourceTokenizer(tmp_path)
    text = encoder.decode(data.windows.tokens_WT[0][1:].tolist())
    rendered = "".join(f"user: weight {index}</s>assistant: scale</s>" for index in range(30))
    assert text.strip() in rendered
    assert data.report["documents"]["read"] == 30


def test_dialogues_measure_as_well(tmp_path: Path) -> None:
    source = _write_talk(tmp_path / "talk.jsonl", 30)
    encoder = SourceTokenizer(_tokenizer_dir(tmp_path, PLAIN))
    windows = token_windows(
        load_documents(source), encoder, num_windows=8, seq_len=16, seed=0, what="held-out text"
    )
    assert windows.digest == _data(tmp_path, PLAIN).windows.digest


def test_without_a_template_dialogues_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"calibration text: the model's tokenizer has no chat temp"
    ):
        _data(tmp_path, None)


def test_refused_dialogues_are_listed_but_not_all(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        _data(tmp_path, PLAIN, role="robot")
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == 6
    assert "talk.jsonl:2: the chat template refuses" in problems[1]
    assert problems[-1].endswith("talk.jsonl: 25 more dialogues are wrong")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", None])
def test_a_template_is_found_by_its_files(tmp_path: Path, name: str | None) -> None:
    content = {"tokenizer_config.json": json.dumps({"chat_template": PLAIN})}
    if name is not None:
        (tmp_path / name).write_text(content.get(name, PLAIN))
    assert has_template(tmp_path) == (name is not None)
