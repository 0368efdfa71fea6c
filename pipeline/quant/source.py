"""The original checkpoint as transformers sees it: model, tokenizer, and its companion files.

Both the quantizer and the verification load the original here, so that both mean the same model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.check import check_checkpoint
from pipeline.checkpoint.pickled import holds_pickles
from pipeline.checkpoint.source import PLAIN_METHOD, HfCheckpoint, open_checkpoint
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ModelShape
from pipeline.quant.data import Message, TokenWindows

if TYPE_CHECKING:
    import torch

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A checkpoint with a tokenizer has at least one of these."""

COMPANION_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files beside the weights that say how to use the model; quantizing changes none of them."""


def open_plain_checkpoint(source_dir: Path) -> HfCheckpoint:
    """The unquantized checkpoint of a directory, every tensor in place; headers only.

    Raises:
        CheckpointError: unsupported architecture, quantized already, damaged files, or every tensor
            that is missing, unused or of the wrong shape or dtype.
    """
    checkpoint = open_original(source_dir)
    if checkpoint.format.quant_algo is not None:
        raise CheckpointError(
            Problem(
                str(source_dir),
                f"the checkpoint is quantized already ({checkpoint.format.name})",
                allowed="float16, bfloat16 or float32 weights",
                fix="give the original checkpoint; one that is quantized already is not quantized "
                "again: say its format under quantize",
            )
        )
    return checkpoint


def open_original(source_dir: Path) -> HfCheckpoint:
    """What a build starts from, plain or quantized already, every tensor in place; headers only.

    Raises:
        CheckpointError: unsupported architecture or quantization, damaged files, or every tensor
            that is missing, unused or of the wrong shape or dtype.
    """
    checkpoint = open_checkpoint(source_dir)
    problems = check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format)
    if problems:
        raise CheckpointError(problems)
    return checkpoint


def load_model(source_dir: Path, dtype: torch.dtype) -> Any:
    """A transformers causal language model in eval mode on the CPU, weights cast to `dtype`.

    Weights that are quantized already are dequantized, and inputs of linears rounded where their format
    says so (`dequantized.py`). RoPE comes from our own
    reading of config.json: transformers 4.57 reads a config written by 5.x (`rope_parameters`) as base
    10000 without scaling, and says nothing.

    Raises:
        CheckpointError: see `open_original`.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = open_original(source_dir)
    config = model_config(checkpoint)
    if checkpoint.method != PLAIN_METHOD or holds_pickles(source_dir):
        from pipeline.quant.dequantized import load_through_reader

        return load_through_reader(checkpoint, config, dtype)
    model, loading = AutoModelForCausalLM.from_pretrained(
        source_dir,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
    )
    # transformers fills gaps with random numbers; the table of the architecture has ruled them out.
    gaps = {key: sorted(map(str, names)) for key, names in loading.items() if names}
    assert not gaps, gaps
    return model.eval()


def model_config(checkpoint: HfCheckpoint) -> Any:
    """transformers' config of a checkpoint, with RoPE as config.json says and attention as it must be.

    Gemma 2 caps its attention logits, which only transformers' "eager" attention does; its default
    leaves the cap out without a word.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    _set_rotary(config, checkpoint.shape)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"
    return config


def _set_rotary(config: Any, shape: ModelShape) -> None:
    if shape.position_embedding == "rope_gpt_neox":
        config.rope_theta = shape.rotary_base
        config.rope_scaling = shape.rotary_scaling.to_dict() if shape.rotary_scaling else None


class SourceTokenizer:
    """The tokenizer of a checkpoint as a `pipeline.quant.data.DialogueEncoder`.

    Text that looks like a special token (`</s>` in an HTML parser's source) stays text.

    Raises:
        CheckpointError: there is none, or transformers cannot load it.
    """

    def __init__(self, source_dir: Path) -> None:
        from transformers import AutoTokenizer

        problem = missing_tokenizer(source_dir)
        if problem:
            raise CheckpointError(problem)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source_dir, local_files_only=True)
        except Exception as error:
            # The tokenizers library raises plain Exception for a file of another kind.
            if not isinstance(error, OSError | ValueError | ImportError | KeyError) and (
                type(error) is not Exception
            ):
                raise
            what = f"transformers cannot load the tokenizer: {str(error).splitlines()[0]}"
            raise CheckpointError(Problem(str(source_dir), what)) from error

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a prompt, for most models the begin-of-sequence token."""
        plain, prompt = self.encode("a"), self._tokenizer("a")["input_ids"]
        starts = range(len(prompt) - len(plain) + 1)
        start = next(at for at in starts if prompt[at : at + len(plain)] == plain)
        return tuple(prompt[:start])

    @property
    def separator(self) -> tuple[int, ...]:
        """The end-of-sequence token; nothing for a tokenizer without one."""
        eos = self._tokenizer.eos_token_id
        return () if eos is None else (int(eos),)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return list(encoded["input_ids"])

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a dialogue is written."""
        return bool(self._tokenizer.chat_template)

    def render(self, messages: Sequence[Message]) -> str:
        """The dialogue by the tokenizer's chat template.

        Raises:
            ValueError: the template refuses it, or there are several templates and none is the default.
        """
        from jinja2 import TemplateError

        turns = [{"role": each.role, "content": each.content} for each in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered dialogue; special tokens in it are what they say."""
        encoded = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=False, verbose=False
        )
        return list(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included, spaces untouched."""
        return str(self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))


def refuse_foreign_tokens(windows: TokenWindows, vocab_size: int, source_dir: Path) -> None:
    """Raise CheckpointError when the tokenizer makes ids for which the model has no embedding."""
    highest = int(windows.tokens_WT.max())
    if highest >= vocab_size:
        raise CheckpointError(
            Problem(
                str(source_dir),
                f"the tokenizer gives token id {highest}, the model has {vocab_size} embeddings",
                allowed=f"ids below {vocab_size}",
                fix="put the tokenizer that belongs to these weights beside them",
            )
        )


def missing_tokenizer(source_dir: Path) -> Problem | None:
    """The problem of a checkpoint directory without a tokenizer."""
    if any((source_dir / name).is_file() for name in VOCABULARY_FILES):
        return None
    return Problem(
        str(source_dir),
        "there is no tokenizer beside the weights",
        allowed=f"one of {', '.join(VOCABULARY_FILES)}",
        fix="copy the model's tokenizer files there",
    )


def copy_companions(source_dir: Path, out_dir: Path) -> None:
    """Make the companion files of `out_dir` the same set, with the same bytes, as the source's."""
    for name in COMPANION_FILES:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)
