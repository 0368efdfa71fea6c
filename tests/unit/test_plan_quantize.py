"""What `plan` says of the `quantize` section: each mistake at its line, with what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.plan import Plan, make_plan
from pipeline.stages import quantize_problems
from pipeline.stages.quantize_problems import formats_to_mix
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize")
    write_build(directory)
    return directory


def plan_of(root: Path, **sections: Any) -> Plan:
    """Of int4_awq with groups of 64, on onnxruntime for rtx4090, unless `sections` say otherwise."""
    sections["quantize"] = {"format": "int4_awq"} | sections.get("quantize", {})
    config = write_build(root, **sections)
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests())


Q = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("quantize", "line", "text"),
    [
        (
            {"algorithm": "smoothquant"},
            "algorithm",
            "smoothquant does not make int4_awq; allowed: awq, awq_clip, gptq, rtn; "
            "fix: remove it, or set quantize.format to int8_sq",
        ),
        (
            {"format": "fp8", "algorithm": "gptq"},
            "algorithm",
            "gptq does not make fp8; allowed: max; "
            "fix: remove it, or set quantize.format to int4_awq or int4_gptq",
        ),
        (
            {"format": "fp16", "algorithm": "awq"},
            "algorithm",
            "fp16 is not rounded; fix: remove it, or set quantize.format to int4_awq or w4a8_awq",
        ),
        (
            {"format": "int4_gptq", "search": "modelopt"},
            "search",
            "ModelOpt has no int4_gptq; allowed: gram; "
            "fix: ModelOpt makes int4_awq, w4a8_awq, int8_wo, int8_sq, fp8",
        ),
        (
            {"format": "mixed"},
            "budget",
            'format mixed needs a budget to choose formats by; fix: add `budget: "4.5 bits"`',
        ),
        (
            {"budget": "4.5 bits"},
            "budget",
            "'4.5 bits', but every linear becomes int4_awq; "
            "fix: set quantize.format: mixed, or remove the budget",
        ),
        (
            {"format": "mixed", "budget": "4.5"},
            "budget",
            '\'4.5\' is no budget; allowed: "<number> bits": "4.5 bits"',
        ),
        (
            {"format": "mixed", "budget": "4.2 bits"},
            "budget",
            "4.2 bits are below the smallest mean that can be reached; allowed: 4.34 to less than 16.00 "
            "bits, scales included, with int4_awq, int8_wo, fp8, fp16, groups of 64",
        ),
        (
            {"format": "mixed", "budget": "5 bits", "keep": ["*.down_proj"]},
            "budget",
            "5 bits are below the smallest mean that can be reached; allowed: 6.92 to less than 16.00 "
            "bits, scales included, with int4_awq, int8_wo, fp8, fp16, groups of 64 and these "
            "`keep` rules",
        ),
        (
            {"keep": ["*.wq"]},
            "keep",
            "'*.wq' names no linear of the decoder layers of LlamaForCausalLM; "
            f"allowed: names such as {Q}q_proj; * stands for anything",
        ),
        (
            {"keep": ["*.0.self_attn.k_proj"]},
            "keep",
            f"keeps {Q}k_proj without the others of its group; fix: keep {Q}q_proj, {Q}v_proj too: "
            "TensorRT-LLM joins them to one linear",
        ),
        (
            {"keep": ["*"]},
            "keep",
            "names every linear; fix: keep fewer, or set quantize.format: fp16",
        ),
        (
            {"sensitivity": "kl"},
            "sensitivity",
            "kl, but every linear becomes int4_awq; fix: set quantize.format: mixed, or remove it",
        ),
        (
            {
                "calibration": {
                    "data": "text.txt",
                    "seq_len": 32,
                    "num_samples": 4,
                    "padding": "left",
                }
            },
            "calibration.padding",
            "left, but packed windows have no padding; fix: set layout: padded, or remove it",
        ),
        (
            {"kv_cache": "fp8"},
            "kv_cache",
            "fp8: the engines built here keep their KV cache in fp16; allowed: fp16; "
            "fix: build.backend: tensorrt_llm, or none to end with the checkpoint and its scales",
        ),
        (
            {"calibration": {"data": "text.txt", "num_samples": 8, "seq_len": 300}},
            "calibration.seq_len",
            "300 is more than the model's max_position_embeddings; allowed: at most 256",
        ),
        (
            {"format": "fp16", "kv_cache": "int8"},
            "kv_cache",
            "int8, but nothing is calibrated with quantize.format fp16; allowed: fp16; "
            "fix: choose another quantize.format",
        ),
    ],
)
def test_each_mistake_at_its_line(
    root: Path, quantize: dict[str, Any], line: str, text: str
) -> None:
    (problem,) = plan_of(root, quantize=quantize).config_problems
    assert str(problem).endswith(f": quantize.{line}: {text}")
    number = int(str(problem).partition("tiny.yaml:")[2].partition(":")[0])
    key = (root / "tiny.yaml").read_text().splitlines()[number - 1].strip()
    expected = line.rpartition(".")[2]
    assert key.startswith(expected if expected in (*quantize, "seq_len", "padding") else "quantize")


@pytest.mark.parametrize(
    "quantize",
    [
        {"algorithm": "gptq"},
        {"format": "int4_gptq", "algorithm": "rtn"},
        {"format": "mixed", "budget": "5.5 bits", "algorithm": "awq_clip"},
        {"keep": ["*.down_proj", "model.layers.1.self_attn.*"]},
        {"format": "int8_wo", "search": "modelopt"},
    ],
)
def test_what_goes_together(root: Path, quantize: dict[str, Any]) -> None:
    assert plan_of(root, quantize=quantize).problems == ()


def test_a_gpu_is_looked_for_before_anything_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_problems, "DEVICES", tmp_path)
    (problem,) = plan_of(root, quantize={"device": "cuda"}).config_problems
    assert str(problem).endswith(
        ": quantize.device: cuda, but this machine has no NVIDIA GPU; allowed: cpu; fix: plan "
        "where the GPU is, or set quantize.device: cpu"
    )
    (tmp_path / "nvidiactl").touch()
    assert plan_of(root, quantize={"device": "cuda"}).config_problems
    (tmp_path / "nvidia0").touch()
    assert not plan_of(root, quantize={"device": "cuda"}).config_problems


def test_windows_are_measured_wherever_something_is_calibrated(root: Path) -> None:
    long = {"calibration": {"data": "text.txt", "num_samples": 8, "seq_len": 300}}
    checkpoint_only = plan_of(root, quantize=long, backend="none").config_problems
    assert [problem.what for problem in checkpoint_only] == [
        "300 is more than the model's max_position_embeddings"
    ]
    assert plan_of(root, quantize={"format": "fp16", **long}).problems == ()


def test_stages_cannot_differ_in_what_a_budget_chooses(root: Path) -> None:
    def problems(**mapping: int) -> list[str]:
        quantize = {"format": "mixed", "budget": "5 bits"}
        found = plan_of(root, quantize=quantize, mapping=mapping, backend="none")
        return [str(problem).partition("tiny.yaml:")[2] for problem in found.config_problems]

    assert problems(pp=1, tp=2) == []
    (found,) = problems(pp=2)
    assert found.endswith(
        ": mapping.pp: 2, but format mixed chooses for each layer by itself; TensorRT-LLM counts "
        "layers from the first of a stage, and takes the formats at a place to be those of every "
        "stage; allowed: 1; fix: pp: 1 with a larger tp, or one format for all layers"
    )


def test_padding_for_a_budget_is_that_of_int4(tmp_path: Path) -> None:
    """Feed-forward of 192 on 2 ranks: 96 columns are no whole groups of 64."""
    write_build(tmp_path)
    write_tiny_llama(tmp_path / "weights", intermediate_size=192)
    quantize = {"format": "mixed", "budget": "8 bits"}

    def planned(**mapping: Any) -> Plan:
        return plan_of(tmp_path, quantize=quantize, mapping=mapping, backend="none")

    assert planned(tp=2).problems != ()
    padded = planned(tp=2, pad_ffn=True)
    assert padded.problems == ()
    assert padded.forecast is not None
    assert padded.forecast.subject.shape.padded_intermediate_size == 256


def test_sizes_follow_what_is_kept_and_the_budget(root: Path) -> None:
    def size(**quantize: Any) -> int:
        forecast = plan_of(root, quantize=quantize).forecast
        assert forecast is not None
        return forecast.rank_bytes[0]

    int4, half, plain = size(), size(keep=["*.mlp.*"]), size(format="fp16")
    assert int4 < half < plain
    mixed = {f"{bits} bits": size(format="mixed", budget=f"{bits} bits") for bits in (5, 8, 16)}
    assert mixed["16 bits"] == plain
    assert mixed["5 bits"] < mixed["8 bits"] < plain
    assert abs(mixed["8 bits"] - size(format="int8_wo")) < 0.02 * plain


@pytest.mark.parametrize(
    ("quantize", "target", "note"),
    [
        ({"format": "fp8"}, "a10", "does not run fp8 on a10 (SM86): fp8 needs SM89 or newer"),
        ({"kv_cache": "fp8"}, "a10", "does not run this KV cache on a10 (SM86): an fp8 KV cache"),
        ({"format": "int8_wo"}, "l4", "does not run int8_wo on l4 (SM89): TensorRT-LLM takes int8"),
        ({"format": "int8_sq"}, "l4", ""),
    ],
)
def test_notes_of_a_checkpoint_for_tensorrt_llm(
    root: Path, quantize: dict[str, Any], target: str, note: str
) -> None:
    plan = plan_of(root, quantize=quantize, target=target, backend="none")
    assert plan.problems == ()
    assert plan.forecast is not None
    # 2 tensors x 2 layers x 2 heads of 32, two bytes or one
    assert plan.forecast.fullest.kv_bytes_per_token == (256 if "kv_cache" in quantize else 512)
    assert len(plan.notes) == bool(note)
    assert all(note in found for found in plan.notes)


def test_formats_that_a_mixed_build_may_use(root: Path) -> None:
    def formats(backend: str, target: str) -> tuple[str, ...]:
        return formats_to_mix(load_config(write_build(root, backend=backend, target=target)))

    assert formats("tensorrt_rtx", "a10") == ("int4_awq", "int8_wo", "fp16")
    assert formats("none", "l4") == ("int4_awq", "int8_sq", "fp8", "fp16")
    assert formats("tensorrt_rtx", "h100-80gb") == ()  # compiles nothing for it
