"""Every quantized format beside Llama's int4: ModelOpt's two exports of one quantized model.

Ours is converted from the unified layout, theirs written by the TensorRT-LLM exporter. For AWQ the two
differ on purpose where the unified layout folds a pre-quant scale into the norm and averages those of
gate and up; test_modelopt_export.py shows for Llama that they mean the same. INT8 SmoothQuant is equal
to the bit everywhere. FP8 is, but for codes that ModelOpt rounds to the neighbour: its unified layout
divides by the scale in float16, its TensorRT-LLM exporter in float32. Ours are those of the source.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import detect_format
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.progress import SilentProgress
from tests.tiny_models import write_tiny

DECODERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
}
PRESETS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
}
CASES = [
    *((architecture, "int4_awq") for architecture in DECODERS if architecture[:5] != "Llama"),
    ("LlamaForCausalLM", "w4a8_awq"),
    ("LlamaForCausalLM", "fp8"),
    ("LlamaForCausalLM", "int8_sq"),
    ("Qwen2ForCausalLM", "fp8"),
]
# Folded scales, the norms that took them, and linears whose scales the unified layout averages.
FOLDED = ("qkv.prequant_scaling_factor", "input_layernorm.weight", "post_layernorm.weight")
AVERAGED = ("mlp.fc.", "mlp.gate.")


def _load(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16).eval()


def _read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor; numpy alone has no float8."""
    import torch
    from safetensors.torch import load_file

    return {
        name: (str(x.dtype), tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, x in load_file(path).items()
    }


def _quantize(model: Any, name: str) -> Any:
    import modelopt.torch.quantization as mtq
    import torch

    torch.manual_seed(0)
    batch = torch.randint(0, 320, (4, 32))
    preset = copy.deepcopy(getattr(mtq, PRESETS[name]))
    return mtq.quantize(model, preset, lambda quantized: quantized(batch))


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_linears_are_bit_identical(tmp_path: Path, architecture: str, name: str) -> None:
    import torch
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint

    plain = write_tiny(
        architecture,
        tmp_path / "plain",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=1,
        vocab_size=320,
    )
    model = _quantize(_load(plain), name)
    for tp in (1, 2):
        with torch.inference_mode():
            export_tensorrt_llm_checkpoint(
                model,
                DECODERS[architecture],
                torch.float16,
                tmp_path / f"theirs-{tp}",
                inference_tensor_parallel=tp,
            )
    unified = tmp_path / "unified"
    export_hf_checkpoint(model, export_dir=unified)
    assert detect_format(unified) == name
    codes = _read(unified / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"][2]
    for tp in (1, 2):
        ours_dir, theirs_dir = tmp_path / f"ours-{tp}", tmp_path / f"theirs-{tp}"
        ours_dir.mkdir()
        convert_checkpoint(unified, ours_dir, tp=tp, pp=1, progress=SilentProgress())
        for rank in range(tp):
            ours, theirs = (
                _read(directory / f"rank{rank}.safetensors") for directory in (ours_dir, theirs_dir)
            )
            _assert_same(ours, theirs, name)
            if tp == 1:
                assert ours["transformer.layers.0.attention.dense.weight"][2] == codes
        configs = [
            json.loads((directory / "config.json").read_text())["quantization"]
            for directory in (ours_dir, theirs_dir)
        ]
        assert configs[0] == configs[1]


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any], fmt: str) -> None:
    assert ours.keys() == theirs.keys()
    compared = set()
    for name in ours:
        assert ours[name][:2] == theirs[name][:2], name
        if ours[name][0] == "torch.float8_e4m3fn":
            _assert_close_codes(ours[name][2], theirs[name][2])
            continue
        deliberate = name.endswith(FOLDED) or any(part in name for part in AVERAGED)
        if "awq" in fmt and deliberate:
            continue
        assert ours[name] == theirs[name], name
        compared.add(name)
    if fmt == "int8_sq":
        assert compared == ours.keys()
    for linear in ("attention.dense", "mlp.proj", "attention.qkv"):
        scales = {name for name in ours if linear in name and "_scaling_factor" in name}
        assert {name for name in scales if not name.endswith(FOLDED)} <= compared


def _assert_close_codes(ours: bytes, theirs: bytes) -> None:
    a, b = np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.mean(a != b) < 0.01  # seen: 0.5 %
