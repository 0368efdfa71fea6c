"""lm_head as int8 beside quantized layers: from the YAML to rank files, logits and a fused engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.config import load_config
from pipeline.errors import PlanError
from pipeline.plan import make_plan
from pipeline.progress import SilentProgress
from pipeline.run import run
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.network_logits import engine, largest_difference
from tests.run_views import Recorder
from tests.tiny import write_tiny_llama
from tests.tiny_models import TINY
from tests.tiny_text import write_tiny_tokenizer
from tests.unit.test_rtx_formats import build

VOCAB = 514  # of four ranks the last has two rows of padding


INT8 = ("int8_wo", 4, True)


def _converted(root: Path, fmt: str, tp: int, *, tied: bool) -> tuple[Path, Path]:
    """(quantized checkpoint, TensorRT-LLM checkpoint of `tp` ranks) of a whole run."""
    weights = write_tiny_llama(root / "weights", vocab_size=VOCAB, tie_word_embeddings=tied)
    write_tiny_tokenizer(weights)
    quantize = {"format": fmt, "lm_head": "int8_wo"}
    config = write_build(root, backend="none", quantize=quantize, mapping={"tp": tp})
    result = run(load_config(config), Workspace(root), Recorder())
    return result.artifacts["quantize"].path, result.engine_dir


@pytest.fixture(
    scope="module",
    params=[
        INT8,
        pytest.param(("int4_awq", 2, False), marks=pytest.mark.slow),
        pytest.param(("int4_gptq", 2, False), marks=pytest.mark.slow),
        pytest.param(("fp8", 4, True), marks=pytest.mark.slow),
    ],
    ids=lambda param: f"{param[0]}-{'tied' if param[2] else 'untied'}",
)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(source of the head, quantized checkpoint, TensorRT-LLM checkpoint) for each kind of layers."""
    fmt, tp, tied = request.param
    quantized, checkpoint = _converted(tmp_path_factory.mktemp(fmt), fmt, tp, tied=tied)
    return "model.embed_tokens" if tied else "lm_head", quantized, checkpoint


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _tensors(path: Path) -> dict[str, Any]:
    """What lies outside the layers; numpy knows no fp8."""
    with safe_open(path, framework="np") as file:
        names = [name for name in list(file.keys()) if ".layers." not in name]
        return {name: file.get_tensor(name) for name in names}


def _plain(quantized: Path) -> Path:
    """The original weights."""
    return quantized.parents[3] / "weights"


def test_the_head_is_rounded_to_nearest(made: tuple[str, Path, Path]) -> None:
    source, quantized, _ = made
    plain = _tensors(_plain(quantized) / "model.safetensors")
    stored = _tensors(quantized / "model.safetensors")
    weight_VH = plain[f"{source}.weight"].astype(np.float64)
    codes_VH, scale_V = stored["lm_head.weight"], stored["lm_head.weight_scale"]
    assert (codes_VH.dtype, codes_VH.shape) == (np.int8, (VOCAB, 128))
    largest_V = np.abs(weight_VH).max(axis=1).astype(np.float32)
    assert np.array_equal(scale_V, largest_V / np.float32(127))
    error_VH = np.abs(codes_VH.astype(np.float64) * scale_V[:, None] - weight_VH)
    assert (error_VH <= scale_V[:, None] * (0.5 + 1e-4)).all()
    assert np.abs(codes_VH).max(axis=1).min() == 127
    assert np.array_equal(stored["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    config = _json(quantized / "config.json")
    assert config["tie_word_embeddings"] is False
    declared = _json(quantized / "hf_quant_config.json")["quantization"]
    assert declared["quant_algo"] == "MIXED_PRECISION"
    assert declared["quantized_layers"]["lm_head"] == {"quant_algo": "W8A16"}
    assert len(declared["quantized_layers"]) == 2 * 7 + 1


def test_ranks_have_their_rows(made: tuple[str, Path, Path]) -> None:
    _, quantized, checkpoint = made
    stored = _tensors(quantized / "model.safetensors")
    tp = _json(checkpoint / "config.json")["mapping"]["tp_size"]
    rows = -(-VOCAB // tp)
    for rank in range(tp):
        found = _tensors(checkpoint / f"rank{rank}.safetensors")
        own = slice(rank * rows, min((rank + 1) * rows, VOCAB))
        for suffix, source in (("weight", "weight"), ("weights_scaling_factor", "weight_scale")):
            values = stored[f"lm_head.{source}"][own]
            padded = np.zeros((rows, *values.shape[1:]), values.dtype)
            padded[: len(values)] = values
            got = found[f"lm_head.{suffix}"]
            assert got.dtype == padded.dtype
            assert np.array_equal(got, padded), (rank, suffix)
        assert found["transformer.vocab_embedding.weight"].dtype == np.float16
    layers = _json(checkpoint / "quant_cfg.json")["quantized_layers"]
    assert layers["lm_head"] == {"quant_algo": "W8A16"}
    assert _json(checkpoint / "config.json")["quantization"]["quant_algo"] == "MIXED_PRECISION"


def _one_rank(quantized: Path, directory: Path) -> Path:
    directory.mkdir()
    convert_checkpoint(quantized, directory, tp=1, pp=1, progress=SilentProgress())
    return directory


@pytest.mark.parametrize("made", [INT8], indirect=True)
def test_logits(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Of layers whose stored weights are easily read by hand; those of others are in other tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, quantized, _ = made
    network = engine(_one_rank(quantized, tmp_path / "checkpoint"), tmp_path / "engine")
    config = LlamaConfig.from_pretrained(_plain(quantized), tie_word_embeddings=False)
    model = LlamaForCausalLM(config).eval()
    stored = load_file(quantized / "model.safetensors")
    scales = {name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")}
    assert "lm_head.weight" in scales
    values = {
        name: torch.from_numpy(values.astype(np.float32) * stored[f"{name}_scale"][:, None])
        if name in scales
        else torch.from_numpy(values.astype(np.float32))
        for name, values in stored.items()
        if not name.endswith("_scale")
    }
    model.load_state_dict(values, strict=True)
    assert largest_difference(model, network, VOCAB) <= 1e-4  # seen: 2.1e-6


def test_an_engine_with_the_head_fused(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    checkpoint = _one_rank(made[1], tmp_path / "checkpoint")
    facts = build(checkpoint, tmp_path / "engine", "rtx4090")
    assert (facts.num_fused_quantized, facts.num_unfused_quantized) == (2 * 5 + 1, 0)
    plan = (tmp_path / "engine" / "rank0.engine").read_bytes()
    codes = _tensors(checkpoint / "rank0.safetensors")["lm_head.weight"]
    assert codes.tobytes() in plan or codes.T.tobytes() in plan


def test_a_head_of_another_name() -> None:
    """GPT-NeoX calls it embed_out; TensorRT-LLM's name is the same for all."""
    from pipeline.checkpoint.layout import planned_sources, planned_tensors, split_problems
    from pipeline.models import shape_from_hf
    from pipeline.parallel import Mapping
    from pipeline.quant.choose import model_format

    fields = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    shape = shape_from_hf(TINY["GPTNeoXForCausalLM"] | fields)
    fmt = model_format(shape, format="int8_wo", group_size=64, lm_head="int8_wo")
    assert split_problems(shape, fmt) == []
    sources = {source.name: source.dtypes for source in planned_sources(shape, fmt)}
    assert sources["embed_out.weight"] == ("I8",)
    assert sources["embed_out.weight_scale"] == ("F32",)
    found = {spec.name: spec.dtype for spec in planned_tensors(shape, fmt, Mapping())}
    assert found["lm_head.weight"] == "I8"
    assert found["lm_head.weights_scaling_factor"] == "F32"


def test_what_was_made_without_the_field_is_found(tmp_path: Path) -> None:
    config = write_build(tmp_path, fmt="int4_awq")
    assert "lm_head" not in STAGES["quantize"].config_subset(load_config(config))
    config = write_build(tmp_path, fmt="int4_awq", quantize={"lm_head": "int8_wo"})
    assert STAGES["quantize"].config_subset(load_config(config))["lm_head"] == "int8_wo"


def _refused(config: Path) -> list[str]:
    loaded, workspace = load_config(config), Workspace(config.parent)
    with pytest.raises(PlanError) as caught:
        make_plan(loaded, workspace.store, workspace.digests()).raise_problems()
    return [str(problem).partition("quantize.lm_head: ")[2] for problem in caught.value.problems]


def test_a_head_without_quantized_layers(tmp_path: Path) -> None:
    assert _refused(write_build(tmp_path, quantize={"lm_head": "int8_wo"})) == [
        "int8_wo, but nothing is quantized with quantize.format fp16; allowed: fp16; fix: choose "
        "another quantize.format"
    ]


def test_an_odd_vocabulary_for_tensorrt(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1 fuses 512, 514, 516, 520 ... rows, not 513."""
    weights = write_tiny_llama(tmp_path / "weights", vocab_size=513)
    write_tiny_tokenizer(weights)
    quantize = {"lm_head": "int8_wo"}
    config = write_build(tmp_path, fmt="int8_wo", backend="tensorrt_rtx", quantize=quantize)
    assert _refused(config) == [
        "int8_wo, but lm_head has 513 rows on a rank: TensorRT fuses no product with an odd number; "
        "allowed: fp16"
    ]


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    from tests.modelopt_exports import write_plain

    weights = write_plain("GemmaForCausalLM", tmp_path / "weights")
    if not (weights / "tokenizer.json").exists():
        write_tiny_tokenizer(weights)
    config = write_build(tmp_path, fmt="int8_wo", quantize={"lm_head": "int8_wo"})
    assert (
        "int8_wo, but GemmaForCausalLM always shares its head with the embedding; allowed: fp16"
        in _refused(config)
    )
