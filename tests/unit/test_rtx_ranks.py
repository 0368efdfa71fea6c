"""TensorRT-RTX engines of ranks: sums over ranks, stages, several GPUs in one plan, and their checks.

Every build runs in a process of its own, because the compiler keeps the first logger of a process.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import BuildFacts, WorkerRequest, facts_path
from pipeline.engine.rtx_layers import check_layers
from pipeline.engine.rtx_plan import read_header
from pipeline.engine.tensorrt_rtx import engine_path
from pipeline.errors import ExitCode, GateError
from pipeline.network import BuildLimits
from pipeline.network.export import read_checkpoint_spec
from pipeline.progress import SilentProgress
from tests.made_up_codes import write_quantized
from tests.modelopt_exports import write_plain
from tests.tiny_models import TINY

pytest.importorskip("tensorrt_rtx_bindings")
pytestmark = pytest.mark.rtx

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
MULTI_QUERY = {"new_decoder_architecture": False, "multi_query": True}


def convert(
    directory: Path,
    architecture: str,
    fmt: str,
    *,
    tp: int,
    pp: int,
    moe_ep: int = 1,
    **overrides: Any,
) -> Path:
    """Rank files of a random model of two layers."""
    source = write_plain(architecture, directory / "plain", **overrides)
    if fmt != "fp16":
        write_quantized(source, directory / "quantized", fmt)
        source = directory / "quantized"
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    convert_checkpoint(source, checkpoint, tp=tp, pp=pp, moe_ep=moe_ep, progress=SilentProgress())
    return checkpoint


def run(request: WorkerRequest, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The worker, after `prelude` has changed something in its process."""
    main = "from pipeline.engine.worker import main\nsys.exit(main(sys.argv[1]))"
    command = [sys.executable, "-c", f"import sys\n{prelude}\n{main}", request.to_json()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def build(
    checkpoint: Path, engine_dir: Path, ranks: range, also_for: tuple[str, ...] = ()
) -> list[BuildFacts]:
    """Two at a time."""
    engine_dir.mkdir()

    def one(rank: int) -> BuildFacts:
        request = WorkerRequest(
            "tensorrt_rtx", checkpoint, engine_dir, rank, "rtx4090", LIMITS, also_for=also_for
        )
        done = run(request)
        assert done.returncode == 0, done.stderr
        return BuildFacts.from_json(facts_path(engine_dir, rank).read_text())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, ranks))


def check(facts: BuildFacts, fused: int, attentions: int, sums: int) -> None:
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (fused, 0)
    assert (facts.num_fused_attention, facts.num_all_reduces) == (attentions, sums)
    assert facts.proven_bytes is not None
    assert facts.proven_bytes / facts.weight_bytes > 0.95
    assert facts.sms == (89,)


# Architecture, format, tp, pp, moe_ep, overrides; then of each rank: fused products, fused attentions,
# sums. The first stage adds up the embedding, too.
ENGINES: dict[str, tuple[str, str, int, int, int, dict[str, Any], list[tuple[int, int, int]]]] = {
    "llama-tp2-pp2": (
        "LlamaForCausalLM",
        "int4_awq",
        2,
        2,
        1,
        {},
        [(5, 1, 3), (5, 1, 3), (5, 1, 2), (5, 1, 2)],
    ),
    "mixtral-ep2": ("MixtralForCausalLM", "int4_awq", 2, 1, 2, {}, [(12, 2, 5)] * 2),
    "falcon-multi-query": (
        "FalconForCausalLM",
        "fp16",
        2,
        1,
        1,
        MULTI_QUERY,
        [(0, 2, 5)] * 2,
    ),
    "gpt2-pp2": ("GPT2LMHeadModel", "int4_awq", 1, 2, 1, {}, [(4, 1, 0)] * 2),
    "llama-tp2": ("LlamaForCausalLM", "int4_awq", 2, 1, 1, {}, [(10, 2, 5)] * 2),
    "llama-tp4-fp8": ("LlamaForCausalLM", "fp8", 4, 1, 1, {}, [(10, 2, 5)] * 4),
    "llama-pp2": ("LlamaForCausalLM", "int4_awq", 1, 2, 1, {}, [(5, 1, 0)] * 2),
    "gpt2-tp2": ("GPT2LMHeadModel", "int4_awq", 2, 1, 1, {}, [(8, 2, 5)] * 2),
    "falcon-tp4-fp8": ("FalconForCausalLM", "fp8", 4, 1, 1, {}, [(8, 2, 5)] * 4),
    "mixtral-moe-tp2": ("MixtralForCausalLM", "int4_awq", 2, 1, 1, {}, [(20, 2, 5)] * 2),
    # TensorRT has no attention kernel with a soft cap.
    "gemma2-tp2": ("Gemma2ForCausalLM", "int4_awq", 2, 1, 1, {}, [(10, 0, 5)] * 2),
}
QUICK = ("llama-tp2-pp2", "mixtral-ep2", "gpt2-pp2")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES],
)
def test_every_rank_is_fused_summed_and_proven(tmp_path: Path, name: str) -> None:
    architecture, fmt, tp, pp, moe_ep, overrides, expected = ENGINES[name]
    checkpoint = convert(tmp_path, architecture, fmt, tp=tp, pp=pp, moe_ep=moe_ep, **overrides)
    for facts, numbers in zip(
        build(checkpoint, tmp_path / "engine", range(tp * pp)), expected, strict=True
    ):
        check(facts, *numbers)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["fp16", "int4_awq", "int4_gptq", "fp8", "int8_sq", "int8_wo"])
@pytest.mark.parametrize("architecture", TINY)
def test_each_format_of_each_architecture(tmp_path: Path, architecture: str, fmt: str) -> None:
    """The last rank of four: it has padding, and a stage that does not start from tokens."""
    checkpoint = convert(tmp_path, architecture, fmt, tp=2, pp=2, vocab_size=331)
    (facts,) = build(checkpoint, tmp_path / "engine", range(3, 4))
    assert facts.num_unfused_quantized == 0
    assert facts.num_all_reduces == 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank files of Llama, tp 2."""
    return convert(tmp_path_factory.mktemp("ranks"), "LlamaForCausalLM", "int4_awq", tp=2, pp=1)


def test_several_gpus_in_one_plan(ranks: Path, tmp_path: Path) -> None:
    """rtx4090 and l4 are both SM89."""
    engine_dir = tmp_path / "engine"
    (facts,) = build(ranks, engine_dir, range(1, 2), ("rtx5090", "l4", "a10"))
    assert facts.sms == read_header(engine_path(engine_dir, 1)).sms == (86, 89, 120)
    assert (facts.num_fused_quantized, facts.num_all_reduces) == (10, 5)
    log = (engine_dir / "rank1.tensorrt_rtx.log").read_text()
    listing = log.partition("VERBOSE Layers:")[2]
    spec = read_checkpoint_spec(ranks, 1, LIMITS)
    check_layers(listing, spec, "log")
    name = "transformer.layers.1.mlp.proj.all_reduce"
    for broken, problem in (
        (listing.replace("LayerType: comm_allreduce", "LayerType: copy"), f"{name}: became none"),
        (
            listing.replace("comm_allreduce", "comm_allgather"),
            f"{name}: became comm_allgather, expected one comm_allreduce",
        ),
        (
            listing.replace(f"[ONNX Layer: {name}]", "[ONNX Layer: other]"),
            "a collective that the network does not have",
        ),
    ):
        with pytest.raises(GateError) as caught:
            check_layers(broken, spec, "log")
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("prelude", "code", "message"),
    [
        (
            "rtx_build.lower_all_reduces = lambda *given: None",
            ExitCode.GATE,
            "transformer.layers.0.attention.dense.all_reduce: became none, expected one "
            "comm_allreduce",
        ),
        (
            "rtx_build.all_reduce_names = lambda spec: ('embedding.all_reduce',)",
            ExitCode.STAGE,
            "lowering: all-reduces after parsing: embedding.all_reduce, "
            "transformer.layers.0.attention.dense.all_reduce, ",
        ),
    ],
)
def test_a_forgotten_sum_fails_the_build(
    ranks: Path, tmp_path: Path, prelude: str, code: ExitCode, message: str
) -> None:
    request = WorkerRequest("tensorrt_rtx", ranks, tmp_path, 0, "rtx4090", LIMITS)
    done = run(request, f"from pipeline.engine import rtx_build\n{prelude}")
    assert done.returncode == code
    assert message in done.stderr
    assert not facts_path(tmp_path, 0).exists()


def test_gpus_that_cannot_be_in_the_plan_are_all_named(ranks: Path, tmp_path: Path) -> None:
    also_for = ("h100-80gb", "orin-agx-64gb", "a10")
    request = WorkerRequest(
        "tensorrt_rtx", ranks, tmp_path, 0, "rtx4090", LIMITS, also_for=also_for
    )
    done = run(request)
    assert done.returncode == ExitCode.CONFIG
    lines = done.stderr.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "build.also_for: TensorRT-RTX 1.7 cannot compile for h100-80gb (SM90)",
        "build.also_for: TensorRT-RTX 1.7 cannot compile for orin-agx-64gb (SM87)",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "rank0.error.json"]
