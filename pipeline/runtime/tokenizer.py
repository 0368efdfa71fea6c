"""The tokenizer of an engine, read with the `tokenizers` library alone.

Importing transformers would cost a serving process seconds and hundreds of megabytes. What transformers
adds on top of tokenizer.json (beginning-of-sequence rules of the class, added tokens, conversion of
SentencePiece models) is written into tokenizer.json once, by `save_tokenizer`, when an engine is built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import CheckpointError, Problem
from pipeline.tokenizer_file import load_tokenizer_file

TOKENIZER_FILE = "tokenizer.json"
GENERATION_FILE = "generation_config.json"


class TextTokenizer:
    """Text to ids and back. Safe to use from several threads.

    Args:
        directory: holds tokenizer.json, and generation_config.json or tokenizer_config.json for the
            end-of-sequence ids.

    Raises:
        CheckpointError: tokenizer.json is missing or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = _load(directory / TOKENIZER_FILE)
        # Stored by some trainers; they would cut or fill every prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.longest_token_chars = max(map(len, vocabulary), default=1)
        self.eos_ids = _eos_ids(directory, self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids with the special tokens that the model expects around a prompt, such as <s>."""
        return tuple(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; ids outside the vocabulary are left out, too."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def save_tokenizer(source_dir: Path, out_dir: Path) -> None:
    """Write the tokenizer of a Hugging Face checkpoint into `out_dir` so that TextTokenizer agrees with
    transformers: tokenizer.json with all rules in it, its companions, and generation_config.json.

    Imports transformers. Takes configs and tokenizer files only, never code from the checkpoint.

    Raises:
        CheckpointError: no tokenizer there, or one that cannot be expressed as tokenizer.json.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source_dir, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            Problem(
                where=str(source_dir),
                what=f"transformers cannot load a tokenizer: {_first_line(error)}",
                allowed="tokenizer.json, or a tokenizer that transformers can convert to it",
                fix="put the files of the model's tokenizer next to its weights",
            )
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            Problem(
                where=str(source_dir),
                what=f"{type(tokenizer).__name__} has no tokenizer.json form",
                allowed="a fast tokenizer",
            )
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    _save_generation_config(source_dir, out_dir)


def _save_generation_config(source_dir: Path, out_dir: Path) -> None:
    generation = source_dir / GENERATION_FILE
    if generation.is_file():
        shutil.copyfile(generation, out_dir / GENERATION_FILE)
        return
    eos = _read_json(source_dir / "config.json").get("eos_token_id")
    if eos is not None:
        (out_dir / GENERATION_FILE).write_text(json.dumps({"eos_token_id": eos}) + "\n")


def _load(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            Problem(str(path), "there is no such file", fix="build the engine again")
        )
    return load_tokenizer_file(path, fix="build the engine again")


def _eos_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json knows them all; tokenizer_config.json names one.

    Empty when neither tells: such a model ends at max_tokens or a stop word only.
    """
    eos = _read_json(directory / GENERATION_FILE).get("eos_token_id")
    if eos is None:
        named = _read_json(directory / "tokenizer_config.json").get("eos_token")
        text = named.get("content") if isinstance(named, dict) else named
        eos = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset([eos])


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no file.

    Raises:
        CheckpointError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not JSON: {_first_line(error)}")) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(str(path), "not a JSON object"))
    return content


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
