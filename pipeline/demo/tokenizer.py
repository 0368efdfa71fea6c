"""Byte-level BPE tokenizer of the demo model: 4096 tokens, any text survives a round trip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB_SIZE = 4096
BOS_TOKEN, BOS_ID = "<s>", 0
EOS_TOKEN, EOS_ID = "</s>", 1


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn merges from `texts`. Encoding puts BOS_TOKEN first unless special tokens are off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, BOS_ID)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path, max_length: int) -> None:
    """Write the files that `transformers.AutoTokenizer` loads without a network."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,  # only for callers that pad; the model never sees it in training
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out_dir)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    """All documents in one row of token ids [T], each followed by EOS_ID; no BOS_ID.

    Text that happens to read like a special token (`</s>` in an HTML parser) stays text.
    """
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    encodings = plain.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.asarray([*row.ids, EOS_ID], dtype=np.int64) for row in encodings])
