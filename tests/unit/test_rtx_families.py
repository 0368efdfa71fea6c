"""TensorRT-RTX compiles every family, without a GPU, and every check of the build passes.

Every build runs in a process of its own, because the compiler keeps the first logger of a process.
The random models of tests/family_checkpoints.py: hidden 96 and 3 layers unless said otherwise.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import BuildFacts, WorkerRequest, facts_path
from pipeline.errors import ExitCode
from pipeline.network import BuildLimits
from pipeline.progress import SilentProgress
from tests.family_checkpoints import random_model, write_checkpoint
from tests.modelopt_exports import export_unified
from tests.rank_checkpoints import read_rank

pytestmark = [
    pytest.mark.rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="TensorRT-RTX is not installed",
    ),
]

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
GROUP_SIZE = 32
NUM_LAYERS = 3

# Inputs of every linear are multiples of the group size, and more than one group. Beside them: int4
# products per layer, and how many attentions become one kernel.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama-biases": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 3},
        5,
        NUM_LAYERS,
    ),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 16}, 5, NUM_LAYERS),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, 5, NUM_LAYERS),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 48}, 5, NUM_LAYERS),
    "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5}, 4, NUM_LAYERS),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}, 5, NUM_LAYERS),
    # TensorRT has no attention kernel with a soft cap.
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "sliding_window": 16},
        5,
        0,
    ),
    "gpt2": ("GPT2LMHeadModel", {}, 4, NUM_LAYERS),
    "gpt-neox": ("GPTNeoXForCausalLM", {"num_attention_heads": 3}, 4, NUM_LAYERS),
    "falcon-multi-query": (
        "FalconForCausalLM",
        {"num_attention_heads": 3, "ffn_hidden_size": 192, "tie_word_embeddings": True},
        4,
        NUM_LAYERS,
    ),
    "falcon-new-decoder": (
        "FalconForCausalLM",
        {"ffn_hidden_size": 192, "new_decoder_architecture": True, "num_kv_heads": 2},
        4,
        NUM_LAYERS,
    ),
    # qkv and dense, and two products for each of four experts.
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        10,
        NUM_LAYERS,
    ),
}
# Where the compiler joins float16 products that share an input in a way of its own: with the input
# projection of attention, over experts; and what it makes of LayerNorm and of a window.
QUICK_FP16 = ("falcon-multi-query", "mixtral")


def _build(
    directory: Path, name: str, group_size: int | None, target: str = "rtx4090"
) -> tuple[BuildFacts, Path]:
    architecture, overrides, _, _ = MODELS[name]
    model = random_model(architecture, group_size=group_size, **overrides)
    checkpoint = write_checkpoint(model, directory / "checkpoint", group_size=group_size)
    engine_dir = directory / "engine"
    engine_dir.mkdir()
    done = _run(WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, target, LIMITS))
    assert done.returncode == 0, done.stderr
    return BuildFacts.from_json(facts_path(engine_dir, 0).read_text()), checkpoint


def _run(request: WorkerRequest, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The worker, after `prelude` has changed something in its process."""
    main = "from pipeline.engine.worker import main\nsys.exit(main(sys.argv[1]))"
    command = [sys.executable, "-c", f"import sys\n{prelude}\n{main}", request.to_json()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _check(facts: BuildFacts, checkpoint: Path, name: str, group_size: int | None) -> None:
    _, _, num_int4, num_attention = MODELS[name]
    num_int4 = 0 if group_size is None else num_int4 * NUM_LAYERS
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (num_int4, 0)
    assert facts.num_fused_attention == num_attention
    assert facts.proven_bytes is not None
    assert facts.num_proven_tensors is not None
    tensors = read_rank(checkpoint)
    assert facts.num_proven_tensors >= len(tensors)
    # A shared table lies in the plan twice, once as lm_head; it is proved once.
    is_shared = "lm_head.weight" not in tensors or MODELS[name][1].get("tie_word_embeddings")
    twice = tensors["transformer.vocab_embedding.weight"].nbytes if is_shared else 0
    assert (facts.proven_bytes + twice) / facts.weight_bytes > 0.95


@pytest.mark.parametrize("name", MODELS)
def test_int4_products_are_fused(tmp_path: Path, name: str) -> None:
    facts, checkpoint = _build(tmp_path, name, GROUP_SIZE)
    _check(facts, checkpoint, name, GROUP_SIZE)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK_FP16 else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_fp16(tmp_path: Path, name: str) -> None:
    facts, checkpoint = _build(tmp_path, name, None)
    _check(facts, checkpoint, name, None)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100-80gb", "rtx3090", "rtx5090"])
@pytest.mark.parametrize("name", MODELS)
def test_other_targets(tmp_path: Path, name: str, target: str) -> None:
    facts, checkpoint = _build(tmp_path, name, GROUP_SIZE, target)
    _check(facts, checkpoint, name, GROUP_SIZE)


# Architecture -> int4 products of a layer, and attentions that become one kernel.
CONVERTED = {
    "MixtralForCausalLM": (2 + 2 * 4, 2),
    "Gemma2ForCausalLM": (5, 0),
    "GPT2LMHeadModel": (4, 2),
    "GPTNeoXForCausalLM": (4, 2),
    "FalconForCausalLM": (4, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CONVERTED)
def test_what_modelopt_quantized(tmp_path: Path, architecture: str) -> None:
    """From ModelOpt's unified layout through our converter: its pre-quant scales are on every linear."""
    exports = export_unified(tmp_path, architecture, "int4_awq")
    checkpoint, engine_dir = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    engine_dir.mkdir()
    convert_checkpoint(exports.unified, checkpoint, tp=1, pp=1, progress=SilentProgress())
    done = _run(WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, "rtx4090", LIMITS))
    assert done.returncode == 0, done.stderr
    facts = BuildFacts.from_json(facts_path(engine_dir, 0).read_text())
    num_int4, num_attention = CONVERTED[architecture]
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (2 * num_int4, 0)
    assert facts.num_fused_attention == num_attention


def test_heads_without_a_kernel_are_refused_before_compiling(tmp_path: Path) -> None:
    """OpenLLaMA 3B has heads of 100 channels. Without the guard the compiler reports a broken check."""
    model = random_model("LlamaForCausalLM", head_dim=100, num_hidden_layers=1)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    engine_dir = tmp_path / "engine"
    engine_dir.mkdir()
    done = _run(WorkerRequest("tensorrt_rtx", checkpoint, engine_dir, 0, "rtx4090", LIMITS))
    assert done.returncode == ExitCode.CONFIG
    assert "no attention kernel for heads of 100 channels" in done.stderr
    assert not (engine_dir / "rank0.weights").exists()


def test_a_mask_that_was_not_expected_fails_the_build(tmp_path: Path) -> None:
    """As a parser that drops masks, or adds one, would be noticed."""
    model = random_model("MistralForCausalLM", sliding_window=16, num_hidden_layers=1)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    prelude = (
        "from pipeline.network.spec import NetworkSpec\n"
        "NetworkSpec.masked_attentions = lambda spec, length: [False] * spec.num_layers"
    )
    request = WorkerRequest("tensorrt_rtx", checkpoint, tmp_path, 0, "rtx4090", LIMITS)
    done = _run(request, prelude)
    assert done.returncode == ExitCode.STAGE
    assert "a mask after parsing: True, in the graph: False" in done.stderr
