"""The light tokenizer against transformers, for each way in which a checkpoint can hold one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.runtime.tokenizer import TextTokenizer, save_tokenizer
from tests.triton.tokenizers_for_tests import KINDS, byte_fallback, byte_level, save

TEXTS = [
    "The quick brown fox",
    " leading and trailing ",
    "a  b\n\n\tc",
    "Grüße 日本語 🙂 e\u0301",
    "<s>not a prompt</s>",
    "don't stop . Now , or never !",
]


def _edit_config(directory: Path, **fields: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _llama_without_template(directory: Path) -> None:
    """As Llama 2 checkpoints: the beginning-of-sequence rule is in the class, not in the file."""
    tokenizer = byte_fallback()
    state = json.loads(tokenizer.to_str())
    state["post_processor"] = None
    save(tokenizer, directory)
    (directory / "tokenizer.json").write_text(json.dumps(state))
    _edit_config(directory, tokenizer_class="LlamaTokenizerFast", add_bos_token=True, legacy=False)


def _llama_without_bos(directory: Path) -> None:
    save(byte_fallback(), directory)
    _edit_config(directory, tokenizer_class="LlamaTokenizerFast", add_bos_token=False)


def _truncating(directory: Path) -> None:
    """Some trainers leave their own truncation and padding in the file."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=50)
    save(tokenizer, directory)


def _with_added_tokens(directory: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.add_tokens(["quick brown"])
    save(tokenizer, directory)


SOURCES: dict[str, Callable[[Path], Any]] = {
    **{kind: lambda directory, make=make: save(make(), directory) for kind, make in KINDS.items()},
    "llama without template": _llama_without_template,
    "llama without bos": _llama_without_bos,
    "truncating": _truncating,
    "added tokens": _with_added_tokens,
}


@pytest.mark.parametrize("source", SOURCES)
def test_same_ids_and_text_as_transformers(source: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    SOURCES[source](tmp_path / "source")
    save_tokenizer(tmp_path / "source", tmp_path / "engine")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer = TextTokenizer(tmp_path / "engine")
    for text in [*TEXTS, "quick brown <|turn|> fox"]:
        ids = reference(text)["input_ids"]
        assert list(tokenizer.encode(text)) == ids
        expected = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(ids) == expected
    begins = tokenizer.encode("x")[0] == reference.bos_token_id
    assert begins == (source != "llama without bos")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [2, 7]}, {2, 7}), ({"eos_token_id": 5}, {5}), ({"eos_token_id": []}, set())],
)
def test_end_of_sequence_ids_come_from_generation_config(
    generation: dict[str, Any], expected: set[int], tmp_path: Path
) -> None:
    save(byte_level(), tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))
    save_tokenizer(tmp_path / "source", tmp_path / "engine")
    assert TextTokenizer(tmp_path / "engine").eos_ids == expected


def test_without_generation_config_the_models_config_names_them(tmp_path: Path) -> None:
    save(byte_level(), tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(
        json.dumps({"model_type": "llama", "eos_token_id": [9, 2]})
    )
    save_tokenizer(tmp_path / "source", tmp_path / "engine")
    assert TextTokenizer(tmp_path / "engine").eos_ids == {9, 2}


def test_as_a_last_resort_the_tokenizer_names_one(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    assert TextTokenizer(tmp_path).eos_ids == {2}


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"transformers cannot load a tokenizer: .*; allowed: "
    ):
        save_tokenizer(tmp_path, tmp_path / "engine")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: there is no such file; fix: build"
    ):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "x"}}'])
def test_a_broken_tokenizer_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: .+; fix: build"):
        TextTokenizer(tmp_path)


def test_a_broken_generation_config(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not a JSON object"):
        TextTokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not JSON: "):
        TextTokenizer(tmp_path)
