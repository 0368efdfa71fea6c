"""Frozen bytes of TensorRT-LLM checkpoints.

The expected files were made once by slicing with numpy by hand and saving with the safetensors library.
When one of these fails on purpose, bump the version of the convert stage too: a store would otherwise
take artifacts under the old key for the new bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress

GOLDEN_DIR = Path(__file__).parent / "checkpoint"

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "rope_theta": 500000.0,
    "vocab_size": 301,
}
LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}
SCALED = ("self_attn.o_proj", "mlp.down_proj")


def ramp(shape: tuple[int, ...], dtype: str, start: int) -> np.ndarray:
    """Values that need no random generator: exact in every dtype used here."""
    values = (np.arange(np.prod(shape)) * 7 + start) % 251
    return (values / 256 if dtype.startswith("float") else values).astype(dtype).reshape(shape)


def write_source(directory: Path, *, quantized: bool) -> Path:
    """A checkpoint by hand, in ModelOpt's unified layout if quantized."""
    directory.mkdir()
    tensors = {
        "model.embed_tokens.weight": ramp((301, 256), "float16", 1),
        "lm_head.weight": ramp((301, 256), "float16", 2),
        "model.norm.weight": ramp((256,), "float16", 3),
    }
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for index, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            tensors[f"{prefix}{norm}.weight"] = ramp((256,), "float16", 10 * layer + index)
        for index, (linear, (rows, columns)) in enumerate(LINEARS.items()):
            start = 100 * layer + index
            name = f"{prefix}{linear}"
            if not quantized:
                tensors[f"{name}.weight"] = ramp((rows, columns), "float16", start)
                continue
            tensors[f"{name}.weight"] = ramp((rows // 2, columns), "uint8", start)
            tensors[f"{name}.weight_scale"] = ramp((rows, columns // 64), "float32", start)
            if linear in SCALED:
                tensors[f"{name}.pre_quant_scale"] = ramp((columns,), "float16", start)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(HF_CONFIG))
    if quantized:
        fields = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False}
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": fields}))
    return directory


def convert(directory: Path, *, quantized: bool, tp: int = 2, pp: int = 2) -> Path:
    source = write_source(directory / "source", quantized=quantized)
    out_dir = directory / "out"
    out_dir.mkdir()
    convert_checkpoint(source, out_dir, tp=tp, pp=pp, progress=SilentProgress())
    return out_dir


def test_config_json(tmp_path: Path) -> None:
    out_dir = convert(tmp_path, quantized=True)
    found = (out_dir / "config.json").read_text()
    assert found == (GOLDEN_DIR / "config.json").read_text()


def test_rank_headers(tmp_path: Path) -> None:
    """Names, dtypes and shapes of every rank, 3 layers over 2 stages."""
    out_dir = convert(tmp_path, quantized=True)
    found = {}
    for path in sorted(out_dir.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            found[path.stem] = {
                name: f"{part.get_dtype()} {part.get_shape()}" for name, part in slices.items()
            }
    assert found == json.loads((GOLDEN_DIR / "rank_headers.json").read_text())


@pytest.mark.parametrize("name", ["fp16", "int4_awq"])
def test_rank_bytes(tmp_path: Path, name: str) -> None:
    out_dir = convert(tmp_path, quantized=name == "int4_awq")
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out_dir.glob("*.safetensors"))
    }
    assert found == json.loads((GOLDEN_DIR / "rank_bytes.json").read_text())[name]
