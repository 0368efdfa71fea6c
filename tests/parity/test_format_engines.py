"""Every format from ModelOpt's export to an engine: converted, exported, run by ONNX Runtime.

Three models are compared with the engine's logits:

- by hand: numpy dequantizes the rank file, ModelOpt's own functions round the inputs. Without rounded
  inputs all logits agree to 1e-5. With them most do; where a value lies on the boundary of two codes,
  float sums in another order take the other code, which later layers spread. So the median is compared.
- ModelOpt's fake-quantized model: the engine must be as close to the original as it. They differ where
  ModelOpt's export rounds again (shared pre-quant scales of AWQ), where weights of q, k and v go to one
  scale (FP8), and, in W4A8, where it simulates that int4 weights become fp8, which here they do not.
- the original.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.progress import SilentProgress
from tests.network_logits import engine, logits_of_transformers, random_ids, whole
from tests.rank_by_hand import put_rank
from tests.tiny_models import write_tiny

Floats = npt.NDArray[np.float32]
VOCAB = 320
PRESETS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
}
EXACT = ("int4_awq", "int8_wo")


@dataclass(frozen=True)
class Built:
    """Logits [B, S, V] of the original, of ModelOpt's simulation, by hand, and of the engine."""

    checkpoint: Path
    original: Floats
    simulated: Floats
    by_hand: Floats
    engine: Floats


def mixed_config() -> dict[str, Any]:
    """FP8 attention, int4 and int8 in the MLPs, one linear left alone."""
    import modelopt.torch.quantization as mtq

    fp8 = {"num_bits": (4, 3), "axis": None}
    config: dict[str, Any] = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = "max"
    config["quant_cfg"] += [
        {"quantizer_name": "*self_attn*weight_quantizer", "cfg": fp8},
        {"quantizer_name": "*self_attn*input_quantizer", "cfg": fp8, "enable": True},
        {
            "quantizer_name": "*layers.0.mlp.down_proj.weight_quantizer",
            "cfg": {"num_bits": 8, "axis": 0},
        },
        {"quantizer_name": "*layers.1.mlp.down_proj*", "enable": False},
    ]
    return config


def quantized(plain: Path, name: str) -> Any:
    """The model in float32, its weights and statistics numbers that float16 holds: what is exported."""
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16).eval().float()
    torch.manual_seed(0)
    batch = torch.randint(0, VOCAB, (4, 32))
    config = mixed_config() if name == "mixed" else copy.deepcopy(getattr(mtq, PRESETS[name]))
    mtq.quantize(model, config, lambda quantized: quantized(batch))
    return model.half().float()


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp(request.param)
    plain = write_tiny(
        "LlamaForCausalLM",
        root / "plain",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=VOCAB,
    )
    ids = random_ids(VOCAB, 2)
    original = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16).eval().float()
    before = logits_of_transformers(original, ids)
    model = quantized(plain, request.param)
    simulated = logits_of_transformers(model, ids)
    export_hf_checkpoint(model.half(), export_dir=root / "unified")
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(root / "unified", checkpoint, tp=1, pp=1, progress=SilentProgress())
    network: OnnxNetwork = engine(checkpoint, root / "engine")
    put_rank(original, checkpoint)
    by_hand = logits_of_transformers(original, ids)
    return Built(checkpoint, before, simulated, by_hand, whole(network, ids))


@pytest.mark.parametrize("built", [*PRESETS, "mixed"], indirect=True)
def test_an_engine_computes_what_its_format_means(
    built: Built, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["built"]
    difference = np.abs(built.engine - built.by_hand)
    if name in EXACT:
        assert difference.max() <= 1e-5  # seen: 3.1e-6
    else:
        assert np.median(difference) <= 1e-5  # seen: 1.2e-6
        assert difference.mean() <= 0.02  # seen: 0.0104, W4A8; original and simulation: 0.196
    loss = np.abs(built.simulated - built.original).mean()
    assert loss > 0.002  # a real quantization
    # seen: 0.982 (W4A8, whose weights are not rounded twice) to 1.049 (FP8, whose q, k and v are)
    assert np.abs(built.engine - built.original).mean() <= 1.1 * loss


@pytest.mark.parametrize("built", ["mixed"], indirect=True)
def test_a_mixed_checkpoint_names_every_linear(built: Built) -> None:
    config = json.loads((built.checkpoint / "config.json").read_text())["quantization"]
    assert config == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    layers = json.loads((built.checkpoint / "quant_cfg.json").read_text())["quantized_layers"]
    found = {
        name.removeprefix("transformer.layers."): layers[name]["quant_algo"] for name in layers
    }
    assert found == {
        **{f"{layer}.attention.{name}": "FP8" for layer in (0, 1) for name in ("qkv", "dense")},
        **{f"{layer}.mlp.{name}": "W4A16_AWQ" for layer in (0, 1) for name in ("fc", "gate")},
        "0.mlp.proj": "W8A16",
    }
