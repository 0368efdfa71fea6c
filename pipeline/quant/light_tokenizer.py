"""tokenizer.json through the tokenizers library alone: a look at the data need not wait for torch.

transformers adds rules of its own to tokenizer.json for most tokenizer classes. So this reads only
those of the plain class, to which it adds nothing; a test compares both ways.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.quant.data import DialogueEncoder, Message
from pipeline.tokenizer_file import load_tokenizer_file

_PLAIN_CLASS = "PreTrainedTokenizerFast"
_RULES = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
"""Fields of tokenizer_config.json that change what the class does."""

_QUICK_BYTES = 1 << 20
"""Larger tokenizer.json files take tenths of a second."""


def encoder_of(source_dir: Path, *, dialogues: bool) -> DialogueEncoder:
    """The quickest encoder that gives the ids that quantizing will use.

    Args:
        dialogues: a chat template is needed, which transformers renders.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be read.
    """
    from pipeline.quant.source import SourceTokenizer

    config = _config(source_dir)
    if _is_plain(source_dir, config) and not dialogues:
        return LightTokenizer(source_dir, config)
    return SourceTokenizer(source_dir)


def quick_encoder(source_dir: Path) -> LightTokenizer | None:
    """The tokenizer, where the tokenizers library reads it rightly, alone and in a moment."""
    config, path = _config(source_dir), source_dir / "tokenizer.json"
    if not _is_plain(source_dir, config) or path.stat().st_size > _QUICK_BYTES:
        return None
    try:
        return LightTokenizer(source_dir, config)
    except CheckpointError:  # whoever needs the tokenizer reports it
        return None


def _is_plain(source_dir: Path, config: dict[str, Any]) -> bool:
    """Whether transformers adds nothing to tokenizer.json."""
    plain = config.get("tokenizer_class") == _PLAIN_CLASS and not set(_RULES) & set(config)
    return plain and (source_dir / "tokenizer.json").is_file()


def _config(source_dir: Path) -> dict[str, Any]:
    try:
        config = json.loads((source_dir / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):  # transformers has its own words for it
        return {}
    return config if isinstance(config, dict) else {}


class LightTokenizer:
    """A `pipeline.quant.data.DialogueEncoder` for texts; dialogues are left to transformers.

    Raises:
        CheckpointError: tokenizer.json cannot be read.
    """

    def __init__(self, source_dir: Path, config: dict[str, Any]) -> None:
        path = source_dir / "tokenizer.json"
        self._tokenizer: Any = load_tokenizer_file(path, fix="fetch it again")
        # Stored by some trainers; they would cut or fill every text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        eos = config.get("eos_token")
        text = eos.get("content") if isinstance(eos, dict) else eos
        self._eos = None if text is None else self._tokenizer.token_to_id(str(text))

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a prompt."""
        plain, prompt = self.encode("a"), list(self._tokenizer.encode("a").ids)
        starts = range(len(prompt) - len(plain) + 1)
        start = next(at for at in starts if prompt[at : at + len(plain)] == plain)
        return tuple(prompt[:start])

    @property
    def separator(self) -> tuple[int, ...]:
        """The end-of-sequence token; nothing for a tokenizer without one."""
        return () if self._eos is None else (int(self._eos),)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    @property
    def has_chat_template(self) -> bool:
        """Not here."""
        return False

    def render(self, messages: Sequence[Message]) -> str:
        """Not here."""
        raise NotImplementedError

    def encode_rendered(self, text: str) -> list[int]:
        """Not here."""
        raise NotImplementedError
