"""Mixed precision, kept linears and KV cache scales: ModelOpt's two exports of one quantized model.

Ours is converted from the unified layout, theirs written by the TensorRT-LLM exporter. Not compared are
codes of FP8, which ModelOpt's two exporters round differently (test_modelopt_formats.py).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import open_checkpoint, planned_bytes
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import PlanError
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from tests.tiny_models import write_tiny

FP8 = {"num_bits": (4, 3), "axis": None}
OTHER_CACHE_SCALES = (".k_cache_scaling_factor", ".v_cache_scaling_factor")
INT8_ROWS = {"num_bits": 8, "axis": 0}


def write_plain(directory: Path) -> Path:
    return write_tiny(
        "LlamaForCausalLM",
        directory,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=320,
    )


def rounded(*rules: dict[str, Any]) -> dict[str, Any]:
    """Int4 by rounding, and what `rules` say otherwise."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = "max"
    config["quant_cfg"] += rules
    return config


def mixed() -> dict[str, Any]:
    return rounded(
        {"quantizer_name": "*self_attn*weight_quantizer", "cfg": FP8},
        {"quantizer_name": "*self_attn*input_quantizer", "cfg": FP8, "enable": True},
        {"quantizer_name": "*mlp.down_proj.weight_quantizer", "cfg": INT8_ROWS},
        {"quantizer_name": "*layers.1.mlp.up_proj*", "enable": False},
    )


def kept() -> dict[str, Any]:
    return rounded({"quantizer_name": "*layers.1.mlp*", "enable": False})


def fp8_cache() -> dict[str, Any]:
    return rounded({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": FP8, "enable": True})


def exports(root: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """The unified layout, and the TensorRT-LLM checkpoint for tp 2."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
    from transformers import AutoModelForCausalLM

    plain = write_plain(root / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16).eval()
    torch.manual_seed(0)
    batch = torch.randint(0, 320, (4, 32))
    mtq.quantize(model, config, lambda quantized: quantized(batch))
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model, "llama", torch.float16, root / "theirs", inference_tensor_parallel=2
        )
    export_hf_checkpoint(model, export_dir=root / "unified")
    return root / "unified", root / "theirs"


def read(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor; numpy alone has no float8."""
    import torch
    from safetensors.torch import load_file

    return {
        name: (str(x.dtype), tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, x in load_file(path).items()
    }


def config_of(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text())["quantization"]


@pytest.mark.parametrize("config", [mixed, kept, fp8_cache])
def test_rank_files_equal_modelopts(tmp_path: Path, config: Any) -> None:
    unified, theirs_dir = exports(tmp_path, config())
    ours_dir = tmp_path / "ours"
    ours_dir.mkdir()
    convert_checkpoint(unified, ours_dir, tp=2, pp=1, progress=SilentProgress())
    checkpoint = open_checkpoint(unified)
    for mapping in mappings(2, 1):
        name = f"rank{mapping.rank}.safetensors"
        size = planned_bytes(checkpoint.shape, checkpoint.format, mapping)
        assert size == (ours_dir / name).stat().st_size
        ours, theirs = read(ours_dir / name), read(theirs_dir / name)
        # Two more cache scales, of keys and of values, which TensorRT-LLM joins to the one we write;
        # and we write pre-quant scales of ones, without which it cannot load W4A16_AWQ.
        extra = {
            key
            for key in theirs
            if key.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))
        }
        ones = {key for key in ours if key.endswith("prequant_scaling_factor")}
        assert ours.keys() - ones == theirs.keys() - extra - ones
        for key in theirs.keys() - extra:
            if key in ones and key not in theirs:
                assert set(np.frombuffer(ours[key][2], np.float16)) == {1.0}
            elif ours[key][0] == "torch.float8_e4m3fn":
                assert ours[key][:2] == theirs[key][:2]
            else:
                assert ours[key] == theirs[key], key
    assert config_of(ours_dir) == expected_config(config_of(theirs_dir))
    if checkpoint.format.is_mixed:
        ours_layers, theirs_layers = (
            json.loads((directory / "quant_cfg.json").read_text())
            for directory in (ours_dir, theirs_dir)
        )
        assert ours_layers == theirs_layers


def expected_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt shortens the names of excluded linears; TensorRT-LLM takes both."""
    if "exclude_modules" in theirs and len(theirs["exclude_modules"]) > 1:
        assert sorted(theirs["exclude_modules"]) == ["lm_head", "transformer.layers.1.mlp*"]
        modules = [f"transformer.layers.1.mlp.{name}" for name in ("fc", "gate", "proj")]
        return theirs | {"exclude_modules": ["lm_head", *modules]}
    return theirs


def test_cache_scales_are_the_larger_of_both(tmp_path: Path) -> None:
    """Of FP8 at least 1, as ModelOpt's exporter has it; of INT8 as they are."""
    from safetensors.numpy import load_file, save_file

    unified, _ = exports(tmp_path, fp8_cache())
    tensors = CheckpointReader(unified).tensors
    assert tensors["model.layers.1.self_attn.k_proj.k_scale"].shape == ()
    values = load_file(unified / "model.safetensors")
    for layer, (k, v) in enumerate([(0.5, 3.0), (2.0, 0.25)]):
        prefix = f"model.layers.{layer}.self_attn."
        values[f"{prefix}k_proj.k_scale"] = np.array(k, np.float32)
        values[f"{prefix}v_proj.v_scale"] = np.array(v, np.float32)
    values["model.layers.0.self_attn.v_proj.v_scale"] = np.array(0.75, np.float32)
    save_file(values, unified / "model.safetensors")
    for algo, expected in (("FP8", [1.0, 2.0]), ("INT8", [0.75, 2.0])):
        path = unified / "hf_quant_config.json"
        fields = json.loads(path.read_text())
        fields["quantization"]["kv_cache_quant_algo"] = algo
        path.write_text(json.dumps(fields))
        out_dir = tmp_path / algo
        out_dir.mkdir()
        convert_checkpoint(unified, out_dir, tp=2, pp=1, progress=SilentProgress())
        assert config_of(out_dir)["kv_cache_quant_algo"] == algo
        for rank in range(2):
            found = load_file(out_dir / f"rank{rank}.safetensors")
            names = [
                f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in (0, 1)
            ]
            assert [found[name].tolist() for name in names] == [[value] for value in expected]


def test_stages_must_have_the_same_formats(tmp_path: Path) -> None:
    unified, _ = exports(tmp_path, kept())
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError) as caught:
        convert_checkpoint(unified, tmp_path / "out", tp=1, pp=2, progress=SilentProgress())
    assert str(caught.value) == (
        "pp=2: layers 0 and 1 are both layer 0 of a stage, and have different formats; TensorRT-LLM "
        "counts layers from the first of a stage, so its config cannot tell them apart; "
        "fix: pp: 1, or the same formats at the same place of every stage"
    )
