"""Made-up text and a throw-away tokenizer for the tiny checkpoints of tests/tiny.py."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = (
    "engine",
    "weight",
    "scale",
    "token",
    "layer",
    "rank",
    "cache",
    "batch",
    "model",
    "tensor",
    "group",
)


def made_up_texts(num_texts: int, *, num_words: int = 60, seed: int = 0) -> list[str]:
    """Sentences of random words, the same for the same arguments."""
    choose = random.Random(seed)
    return [
        " ".join(choose.choice(WORDS) for _ in range(num_words)) + f" number {index}.\n"
        for index in range(num_texts)
    ]


def write_tiny_tokenizer(directory: Path, *, vocab_size: int = 512) -> Path:
    """A byte-level BPE tokenizer with <unk> 0, <s> 1, </s> 2, as the tiny checkpoints expect.

    It puts <s> before a prompt. The true vocabulary may come out smaller than `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(made_up_texts(40, seed=99), trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory
