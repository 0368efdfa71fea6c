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
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.network import BuildLimits
from pipeline.progress import SilentProgress
from pipeline.quant.oracle import unpack_int4
from tests.made_up_codes import write_quantized
from tests.modelopt_exports import export_unified, write_plain
from tests.network_logits import LIMITS, engine, largest_difference
from tests.tiny_models import TINY, write_tiny

# Largest difference seen: 2.7e-5 (random int4 codes, Mixtral), 7.6e-6 without those.
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


@pytest.mark.covers("logits", fmt="fp16")
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


def _engine(source: Path, directory: Path) -> OnnxNetwork:
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(source, checkpoint, tp=1, pp=1, progress=SilentProgress())
    return engine(checkpoint, directory / "engine")


@pytest.mark.covers("logits")
@pytest.mark.parametrize("fmt", ["int4_awq"])
@pytest.mark.parametrize("architecture", TINY)
def test_logits_of_what_modelopt_quantized(tmp_path: Path, architecture: str, fmt: str) -> None:
    exports = export_unified(tmp_path, architecture, fmt)
    network = _engine(exports.unified, tmp_path)
    model = _load(exports.plain)
    _put_dequantized(model, exports.unified)
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


@pytest.mark.covers("logits")
@pytest.mark.parametrize("fmt", ["int4_gptq", "int8_wo"])
@pytest.mark.parametrize("architecture", TINY)
def test_logits_of_random_codes(tmp_path: Path, architecture: str, fmt: str) -> None:
    """Zero points, and experts whose scales differ, which no exporter of ModelOpt makes."""
    plain = write_plain(architecture, tmp_path / "plain")
    write_quantized(plain, tmp_path / "quantized", fmt)
    network = _engine(tmp_path / "quantized", tmp_path)
    model = _load(plain)
    _put_dequantized(model, tmp_path / "quantized")
    assert largest_difference(model, network, model.config.vocab_size) <= TOLERANCE


def _put_dequantized(model: Any, quantized: Path) -> None:
    """The model gets the weights that the files of a quantized checkpoint stand for."""
    import torch

    tensors = load_file(quantized / "model.safetensors")
    is_gemma = type(model).__name__.startswith("Gemma")
    conv1d = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D"
    }
    num_quantized = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = tensors[name].astype(np.float32)
            if f"{name}_scale" in tensors:
                num_quantized += 1
                value = _dequantized(tensors, name)
                value = value.T if name in conv1d else value
            elif is_gemma and value.ndim == 1:
                value = (value + 1).astype(np.float16).astype(np.float32) - 1
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    layers = model.config.num_hidden_layers
    assert num_quantized == sum(f"{name}_scale" in tensors for name in tensors) >= 4 * layers


def _dequantized(tensors: dict[str, Any], name: str) -> Any:
    """[out, in] float32; scales of int4 are float16, as an engine holds them."""
    module = name.removesuffix(".weight")
    codes, scale = tensors[name], tensors[f"{name}_scale"]
    if scale.ndim == 2:
        scale = scale.astype(np.float16).astype(np.float32)
    codes_NK = (unpack_int4(codes) if codes.dtype == np.uint8 else codes).astype(np.float32)
    repeats = codes_NK.shape[1] // (scale.shape[1] if scale.ndim == 2 else 1)
    if f"{module}.weight_zero_point" in tensors:
        codes_NK = codes_NK - np.repeat(tensors[f"{module}.weight_zero_point"], repeats, axis=1)
    scale_NK = np.repeat(scale, repeats, axis=1) if scale.ndim == 2 else scale[:, None]
    prequant_K = tensors.get(f"{module}.pre_quant_scale", np.ones(1)).astype(np.float32)
    return codes_NK * scale_NK * prequant_K
