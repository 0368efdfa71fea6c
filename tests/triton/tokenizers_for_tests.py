"""Small tokenizers of the kinds that models use, trained on the spot in well under a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Grüße aus Köln! Das Wetter ist schön, aber die Straße ist naß.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))\n",
    "日本語のテキストもあります。漢字とかな。",
    "Emoji 🙂🙃 and 👩‍👩‍👧 families, e\u0301 combining.",
] * 3

SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: bytes are letters, a space belongs to the following word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = _bos_template()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: spaces are a letter, unknown characters become byte tokens."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.normalizer = normalizer
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=SPECIAL + bytes_, show_progress=False
    )
    learned.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    # Byte tokens must be plain vocabulary, as SentencePiece has them, not special tokens.
    state: dict[str, Any] = json.loads(learned.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=state["vocab"],
            merges=[tuple(merge) for merge in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = _bos_template()
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5 and many multilingual models: Unigram with a Metaspace decoder."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = _bos_template()
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}


def save(tokenizer: Tokenizer, directory: Path, **extra: Any) -> Path:
    """Write it as transformers does, with its companions."""
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    ).save_pretrained(directory)
    return directory


def _bos_template() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
