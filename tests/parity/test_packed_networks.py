"""Search, pack, convert, build: logits of the network == transformers with the stored weights.

Each step is proven apart; this shows for every architecture that they mean the same by a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import detect_format
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.models import ARCHITECTURES, shape_from_hf
from pipeline.progress import SilentProgress
from pipeline.quant.packing.activations import simulate_inputs
from pipeline.quant.packing.config import quant_config_json
from pipeline.quant.packing.in_memory import PackedTensors, dequantized_layer
from pipeline.quant.packing.layer import pack_layer
from pipeline.quant.recipe import ALGORITHMS, LayerRecipe
from pipeline.quant.search.layer import quantize_layer
from pipeline.quant.source import load_model
from tests.network_logits import (
    engine,
    largest_difference,
    logits_of_network,
    logits_of_transformers,
    random_ids,
)
from tests.packed_layers import GROUP_SIZE, batches, cut, linears_of, load_small, write_small


def _packed(source: Path, fmt: str, directory: Path, keep: str = "") -> dict[str, Any]:
    """Tensors of all layers; the whole quantized checkpoint is written into `directory`.

    Args:
        keep: a linear that stays plain in layer 0.
    """
    import torch
    from safetensors.torch import load_file, save_file

    def run(mini: Any) -> None:
        with torch.no_grad():
            for batch in batches():
                mini(batch)

    tensors: dict[str, Any] = {}
    formats: dict[str, str] = {}
    for layer, (prefix, mini) in enumerate(cut(load_small(source))):
        linears = [name for name in linears_of(mini, prefix) if layer or name != keep]
        recipe = LayerRecipe(dict.fromkeys(linears, fmt), {fmt: ALGORITHMS[fmt][0]}, GROUP_SIZE)
        quantize_layer(mini, recipe, run)
        tensors |= pack_layer(mini, recipe, layer)
        formats |= {f"{prefix}{name}": fmt for name in linears}
    inside = prefix.partition(".1.")[0]
    outer = load_file(source / "model.safetensors").items()
    whole = tensors | {name: value for name, value in outer if not name.startswith(f"{inside}.")}
    directory.mkdir()
    save_file(whole, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    quant_config = quant_config_json(shape_from_hf(config), formats, group_size=GROUP_SIZE)
    (directory / "hf_quant_config.json").write_text(json.dumps(quant_config.hf_quant_config))
    config["quantization_config"] = quant_config.quantization_config
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def _stored_model(source: Path, tensors: dict[str, Any]) -> Any:
    """float32, as an engine holds it: scales of groups, and Gemma's 1 + w, in float16."""
    import torch

    model = load_small(source, "float32")
    held = {
        name: value.half().float() if name.endswith("weight_scale") and value.dim() == 2 else value
        for name, value in tensors.items()
    }
    assert model.load_state_dict(dequantized_layer(held), strict=False).unexpected_keys == []
    if type(model).__name__.startswith("Gemma"):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.copy_((parameter + 1).half().float() - 1)
    return model


def _network(directory: Path) -> OnnxNetwork:
    """Of the quantized checkpoint in `directory`."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(directory / "quantized", checkpoint, tp=1, pp=1, progress=SilentProgress())
    return engine(checkpoint, directory / "engine")


@pytest.mark.parametrize(
    ("architecture", "fmt"),
    [
        *((architecture, "int4_awq") for architecture in ARCHITECTURES),
        ("LlamaForCausalLM", "int4_gptq"),
        ("LlamaForCausalLM", "int8_wo"),
        ("GPTNeoXForCausalLM", "int4_gptq"),
        ("GPT2LMHeadModel", "int8_wo"),
    ],
)
def test_logits(tmp_path: Path, architecture: str, fmt: str) -> None:
    source = write_small(architecture, tmp_path / "source")
    tensors = _packed(source, fmt, tmp_path / "quantized")
    assert detect_format(tmp_path / "quantized") == fmt
    network = _network(tmp_path)
    model = _stored_model(source, tensors)
    difference = largest_difference(model, network, model.config.vocab_size)
    assert difference <= 1e-4  # seen: 2.7e-6
    _assert_loaded(tmp_path / "quantized", dequantized_layer(tensors))


@pytest.mark.parametrize(
    ("architecture", "kept"),
    [("GPT2LMHeadModel", "mlp.c_fc"), ("LlamaForCausalLM", "mlp.down_proj")],
)
def test_logits_with_a_plain_linear(tmp_path: Path, architecture: str, kept: str) -> None:
    """GPT-2's is stored as [in, out] in a plain checkpoint, and as any linear in a quantized one."""
    source = write_small(architecture, tmp_path / "source")
    tensors = _packed(source, "int4_awq", tmp_path / "quantized", keep=kept)
    network = _network(tmp_path)
    model = _stored_model(source, tensors)
    assert largest_difference(model, network, model.config.vocab_size) <= 1e-4  # seen: 1e-6
    _assert_loaded(tmp_path / "quantized", dequantized_layer(tensors))


def _assert_loaded(quantized: Path, values: dict[str, Any]) -> None:
    """What verification takes for the original holds the stored weights; GPT-2's are [in, out] there."""
    import torch

    parameters = dict(load_model(quantized, torch.float32).named_parameters())
    for name, value in values.items():
        is_conv1d = name.startswith("transformer.h.") and ".c_" in name and value.dim() == 2
        assert parameters[name].equal(value.T if is_conv1d else value), name


@pytest.mark.parametrize("fmt", ["fp8", "int8_sq", "w4a8_awq"])
def test_logits_with_rounded_inputs(tmp_path: Path, fmt: str) -> None:
    """Rounded inputs differ at ties, and the next layer makes more of that: compared as a whole."""
    source = write_small("LlamaForCausalLM", tmp_path / "source")
    tensors = _packed(source, fmt, tmp_path / "quantized")
    network = _network(tmp_path)
    model = _stored_model(source, tensors)
    ids_BS = random_ids(model.config.vocab_size, 3)
    without_BSV = logits_of_transformers(model, ids_BS)
    assert simulate_inputs(model, PackedTensors(tensors), "") == 14
    wanted_BSV = logits_of_transformers(model, ids_BS)
    got_BSV = logits_of_network(network, ids_BS)
    difference = np.linalg.norm(got_BSV - wanted_BSV)
    assert difference < 1e-3 * np.linalg.norm(wanted_BSV)  # seen: 3e-7
    assert np.linalg.norm(got_BSV - without_BSV) > 10 * difference
