"""The original as transformers sees it, through our reading of its config.json: the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.quant.source import load_model
from tests.tiny_models import TINY, write_tiny


@pytest.mark.parametrize("architecture", TINY)
def test_load_model_changes_nothing(tmp_path: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_tiny(architecture, tmp_path, dtype="float32")
    tokens = torch.arange(3, 51)[None]  # longer than the windows and the original Phi-3 context
    # transformers' default for Gemma 2 leaves out the cap of its attention logits.
    attention = "eager" if architecture == "Gemma2ForCausalLM" else None
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=attention
    ).eval()
    ours = load_model(tmp_path, torch.float32)
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("architecture", "buffers", "prefix"),
    [
        ("GPT2LMHeadModel", {"transformer.h.0.attn.bias": (1, 1, 128, 128)}, ""),
        ("GPT2LMHeadModel", {"transformer.h.0.attn.bias": (1, 1, 128, 128)}, "transformer."),
        ("GPTNeoXForCausalLM", {"gpt_neox.layers.0.attention.bias": (1, 1, 128, 128)}, ""),
        ("GPTNeoXForCausalLM", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,)}, ""),
        ("FalconForCausalLM", {"transformer.h.0.self_attention.rotary_emb.inv_freq": (8,)}, ""),
        ("LlamaForCausalLM", {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}, ""),
    ],
)
def test_buffers_of_old_checkpoints_do_not_count(
    tmp_path: Path, architecture: str, buffers: dict[str, tuple[int, ...]], prefix: str
) -> None:
    """`prefix` is dropped from every name, as in files saved from the bare decoder."""
    directory = write_tiny(architecture, tmp_path, tie_word_embeddings=bool(prefix))
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: np.ones(shape, np.float32) for name, shape in buffers.items()}
    short = {name.removeprefix(prefix): values for name, values in tensors.items()}
    save_file(short, directory / "model.safetensors", {"format": "pt"})
    import torch

    assert not load_model(directory, torch.float16).training
