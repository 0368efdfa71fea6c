"""Logits of engines of several ranks equal those of one rank, which others compare with transformers.

The ranks' graphs run in this process, and numpy adds up their parts: tests/ranks_in_step.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.engine.onnxruntime import OnnxNetwork
from pipeline.network import BuildLimits, cpu_graph_path, export_network
from pipeline.progress import SilentProgress
from tests.made_up_codes import write_quantized
from tests.modelopt_exports import export_trtllm, load, quantize, write_plain
from tests.network_logits import logits_of_network, random_ids
from tests.ranks_in_step import export_ranks, logits_in_step
from tests.tiny_models import TINY, write_tiny

# Largest difference seen where inputs are not rounded: 1.3e-5.
TOLERANCE = 1e-4
# The windows of TINY are of 16 positions, the texts of 24.
LIMITS = BuildLimits(max_batch_size=2, max_seq_len=32, max_input_len=32)
MAPPINGS = {"tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2), "tp4": (4, 1)}
FORMATS = ("int4_awq", "int4_gptq", "int8_wo")
ROUNDED = ("w4a8_awq", "int8_sq", "fp8")
"""Formats that round the inputs of linears."""


def differences(source: Path, directory: Path, tp: int, pp: int, moe_ep: int = 1) -> Any:
    """Largest difference of logits at each position [B, S] between several ranks and one."""
    (single,) = export_ranks(source, directory / "one", LIMITS)
    network = OnnxNetwork(single.parent, num_threads=1)
    ids_BS = random_ids(network.shape.vocab_size, 2)
    expected_BSV = logits_of_network(network, ids_BS)
    assert expected_BSV.std() > 0.1, "logits that say nothing compare equal to anything"
    graphs = export_ranks(source, directory / "several", LIMITS, tp=tp, pp=pp, moe_ep=moe_ep)
    found_BSV = logits_in_step(graphs, ids_BS, 9)
    assert found_BSV.shape == expected_BSV.shape
    return np.abs(found_BSV - expected_BSV).max(axis=-1)


@pytest.mark.parametrize("architecture", TINY)
def test_tensor_and_pipeline_parallel(tmp_path: Path, architecture: str) -> None:
    """Three layers on two stages; 331 tokens on two ranks, the second of which has a row of padding."""
    source = write_tiny(architecture, tmp_path / "source")
    assert differences(source, tmp_path, 2, 2).max() <= TOLERANCE


@pytest.mark.parametrize("architecture", TINY)
def test_heads_are_repeated_on_more_ranks_than_there_are(tmp_path: Path, architecture: str) -> None:
    """Two key/value heads on four ranks, where the architecture has fewer of them than query heads."""
    source = write_plain(architecture, tmp_path / "source", vocab_size=331)
    assert differences(source, tmp_path, 4, 1).max() <= TOLERANCE


@pytest.mark.parametrize("mapping", ["tp2", "pp2"])
def test_each_kind_alone(tmp_path: Path, mapping: str) -> None:
    source = write_tiny("LlamaForCausalLM", tmp_path / "source")
    assert differences(source, tmp_path, *MAPPINGS[mapping]).max() <= TOLERANCE


def test_windows_alternate_over_stages(tmp_path: Path) -> None:
    """The layer of the second stage is the model's second, which has no window; a first one has."""
    source = write_tiny("Gemma2ForCausalLM", tmp_path / "source")
    assert differences(source, tmp_path, 1, 3).max() <= TOLERANCE


def test_one_head_for_all_ranks(tmp_path: Path) -> None:
    """Falcon 7B's multi-query attention."""
    source = write_plain(
        "FalconForCausalLM", tmp_path / "source", new_decoder_architecture=False, multi_query=True
    )
    assert differences(source, tmp_path, 4, 2).max() <= TOLERANCE


def test_ranks_without_a_token(tmp_path: Path) -> None:
    """Five tokens on four ranks are 2, 2, 1 and none; 130 positions are 33, 33, 33 and 31."""
    source = write_plain(
        "GPT2LMHeadModel", tmp_path / "source", vocab_size=5, max_position_embeddings=130
    )
    assert differences(source, tmp_path, 4, 1).max() <= TOLERANCE


@pytest.mark.parametrize(("tp", "moe_ep"), [(2, 2), (4, 2), (4, 4)])
def test_experts_are_shared_out(tmp_path: Path, tp: int, moe_ep: int) -> None:
    """Whole, and two ranks to an expert (tp 4, moe_ep 2)."""
    plain = write_plain("MixtralForCausalLM", tmp_path / "plain")
    write_quantized(plain, tmp_path / "source", "int4_awq")
    assert differences(tmp_path / "source", tmp_path, tp, 1, moe_ep).max() <= TOLERANCE


def _slow_but_llama(architectures: Any) -> list[Any]:
    quick = "LlamaForCausalLM"
    return [
        name if name == quick else pytest.param(name, marks=pytest.mark.slow)
        for name in architectures
    ]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("architecture", _slow_but_llama(TINY))
def test_formats(tmp_path: Path, architecture: str, fmt: str) -> None:
    plain = write_plain(architecture, tmp_path / "plain", vocab_size=331)
    write_quantized(plain, tmp_path / "source", fmt)
    assert differences(tmp_path / "source", tmp_path, 2, 2).max() <= TOLERANCE


@pytest.mark.parametrize("fmt", ROUNDED)
@pytest.mark.parametrize("architecture", _slow_but_llama(TINY))
def test_formats_that_round_inputs(tmp_path: Path, architecture: str, fmt: str) -> None:
    """A sum in another order may put an input on the other side of a rounding. That shows at the
    position, and a little at those after it; most must agree."""
    plain = write_plain(architecture, tmp_path / "plain", vocab_size=331)
    write_quantized(plain, tmp_path / "source", fmt)
    found_BS = differences(tmp_path / "source", tmp_path, 2, 2)
    assert np.median(found_BS) <= TOLERANCE  # seen: 1e-6
    assert found_BS.max() <= 0.5  # seen: 9e-3; logits reach 4


def test_mixed_formats(tmp_path: Path) -> None:
    """Layers are named within a stage; the first of both have the same formats here."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    plain = write_plain("LlamaForCausalLM", tmp_path / "plain")
    config: dict[str, Any] = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = "max"
    config["quant_cfg"] += [
        {
            "quantizer_name": "*mlp.down_proj.weight_quantizer",
            "cfg": {"num_bits": 8, "axis": 0},
        },
        {"quantizer_name": "*mlp.up_proj*", "enable": False},
    ]
    model = mtq.quantize(load(plain), config, lambda quantized: None)
    export_hf_checkpoint(model, export_dir=tmp_path / "source")
    assert differences(tmp_path / "source", tmp_path, 2, 2).max() <= TOLERANCE
    assert (tmp_path / "several/checkpoint/quant_cfg.json").exists()


def test_ranks_that_modelopt_wrote(tmp_path: Path) -> None:
    """It pads 330 tokens to 384 and says so in vocab_size; four ranks have 96 rows each."""
    model = quantize(
        load(write_plain("LlamaForCausalLM", tmp_path / "plain", vocab_size=330)), "int4_awq"
    )
    ids_BS = random_ids(330, 2)
    logits = {}
    for tp, pp in ((1, 1), (4, 1), (2, 2)):
        directory = tmp_path / f"{tp}-{pp}"
        checkpoint = export_trtllm(model, "LlamaForCausalLM", directory / "checkpoint", tp, pp)
        ranks = range(tp * pp)
        for rank in ranks:
            export_network(checkpoint, rank, directory, LIMITS, SilentProgress(), vocab_size=330)
        graphs = [cpu_graph_path(directory, rank) for rank in ranks]
        logits[tp, pp] = logits_in_step(graphs, ids_BS, 9)
    assert logits[1, 1].shape == (*ids_BS.shape, 330)
    for several in ((4, 1), (2, 2)):
        assert np.abs(logits[several] - logits[1, 1]).max() <= TOLERANCE  # seen: 3.8e-6
