"""Our converter and our network together: Hugging Face files in, logits out, for every family.

The parts are proven apart (test_network_families.py, the converter's own tests); this shows that they
mean the same by the fields of config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.network import BuildLimits
from pipeline.progress import SilentProgress
from pipeline.quant.oracle import unpack_int4
from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint
from tests.network_logits import LIMITS, engine, largest_difference
from tests.tiny_models import TINY, write_tiny
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

# Largest difference seen: 2.9e-6.
TOLERANCE = 1e-4


# Phi-3's longrope: the tiny model's short factors are for up to 32 positions.
SHORT = BuildLimits(max_batch_size=4, max_seq_len=32, max_input_len=32)


def _load(directory: Path) -> Any:
    """In float32, with Gemma's norms as a float16 checkpoint holds them, which is plus one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    if type(model).__name__.startswith("Gemma"):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_((parameter + 1).half().float() - 1)
    return model.eval()


@pytest.mark.parametrize("architecture", TINY)
def test_logits_of_a_converted_checkpoint(tmp_path: Path, architecture: str) -> None:
    source = write_tiny(architecture, tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(source, checkpoint, tp=1, pp=1, progress=SilentProgress())
    limits = SHORT if architecture == "Phi3ForCausalLM" else LIMITS
    network = engine(checkpoint, tmp_path / "engine", limits=limits)
    model = _load(source)
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


@pytest.mark.parametrize(
    "architecture",
    ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"],
)
def test_logits_of_a_quantized_and_converted_checkpoint(tmp_path: Path, architecture: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "vocab_size": 512, "num_hidden_layers": 2}
    if architecture == "Phi3ForCausalLM":
        sizes |= {"rope_scaling": None}
    source = write_tiny(architecture, tmp_path / "source", **sizes)
    write_tiny_tokenizer(source)
    quantized, checkpoint = tmp_path / "quantized", tmp_path / "checkpoint"
    quantized.mkdir()
    checkpoint.mkdir()
    options = QuantizeOptions("int4_awq", group_size=64, num_samples=4, seq_len=16, batch_size=4)
    quantize_checkpoint(source, quantized, options, made_up_texts(6), SilentProgress())
    convert_checkpoint(quantized, checkpoint, tp=1, pp=1, progress=SilentProgress())
    network = engine(checkpoint, tmp_path / "engine")
    model = _load(source)
    _put_dequantized(model, quantized)
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


def _put_dequantized(model: Any, quantized: Path) -> None:
    """The model gets the weights that the files of a quantized checkpoint stand for."""
    import torch

    tensors = load_file(quantized / "model.safetensors")
    num_int4 = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = tensors[name]
            if value.dtype == np.uint8:
                num_int4 += 1
                # float16 scales, as an engine holds them
                scale = tensors[f"{name}_scale"].astype(np.float16).astype(np.float32)
                codes_NK = unpack_int4(value).astype(np.float32)
                value = codes_NK * np.repeat(scale, codes_NK.shape[1] // scale.shape[1], axis=1)
                module = name.removesuffix(".weight")
                value = value * tensors.get(f"{module}.pre_quant_scale", np.float32(1))
            parameter.copy_(torch.from_numpy(value.astype(np.float32)))
    assert num_int4 in (8, 14)
