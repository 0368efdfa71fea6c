"""quantize_checkpoint beside Llama: families whose linears ModelOpt folds alike, and fused ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.models import shape_from_hf
from pipeline.models.linears import decoder_linears
from pipeline.progress import SilentProgress
from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint
from tests.tiny_models import write_tiny
from tests.tiny_text import made_up_texts, write_tiny_tokenizer

OPTIONS = QuantizeOptions("int4_awq", group_size=64, num_samples=4, seq_len=16, batch_size=4)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 1,
    "vocab_size": 512,
}
QUANTIZED = {
    "MistralForCausalLM": 7,
    "Qwen2ForCausalLM": 7,
    "Qwen3ForCausalLM": 7,
    "Phi3ForCausalLM": 4,
}
"""Architecture -> linears of one layer."""


@pytest.mark.parametrize("architecture", QUANTIZED)
def test_quantized_and_converted(tmp_path: Path, architecture: str) -> None:
    source = tmp_path / "source"
    overrides = {**SIZES}
    if architecture == "Phi3ForCausalLM":
        overrides |= {"rope_scaling": None}
    write_tiny(architecture, source, **overrides)
    write_tiny_tokenizer(source)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    quantize_checkpoint(source, quantized, OPTIONS, made_up_texts(6), SilentProgress())
    report = json.loads((quantized / "quant_report.json").read_text())
    assert len(report["linears"]) == QUANTIZED[architecture]
    errors = [facts["relative_weight_error"] for facts in report["linears"].values()]
    assert 0.05 < min(errors) <= max(errors) < 0.2
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    convert_checkpoint(quantized, out_dir, tp=2, pp=1, progress=SilentProgress())
    rank = load_file(out_dir / "rank1.safetensors")
    hf = load_file(quantized / "model.safetensors")
    mlp, target = "model.layers.0.mlp.", "transformer.layers.0.mlp.fc."
    for suffix, stored in (("weight", "weight"), ("weights_scaling_factor", "weight_scale")):
        if architecture == "Phi3ForCausalLM":  # stored [gate; up], wanted [up; gate]
            gate, up = np.split(hf[f"{mlp}gate_up_proj.{stored}"], 2)
            expected = np.concatenate([np.split(up, 2)[1], np.split(gate, 2)[1]])
        else:
            expected = np.split(hf[f"{mlp}gate_proj.{stored}"], 2)[1]
        assert rank[target + suffix].tobytes() == expected.tobytes()
        assert rank[target + suffix].shape == expected.shape


def test_fused_linears_are_listed_once(tmp_path: Path) -> None:
    source = write_tiny("Phi3ForCausalLM", tmp_path, num_hidden_layers=1)
    shape = shape_from_hf(json.loads((source / "config.json").read_text()))
    assert decoder_linears(shape) == (
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    )
