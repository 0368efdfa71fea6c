"""Builds from checkpoints that are quantized already: planned, run and verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.options import ConvertOptions
from pipeline.config import load_config
from pipeline.engine import write_engine_config
from pipeline.network import BuildLimits, export_network
from pipeline.plan import Plan, make_plan
from pipeline.progress import SilentProgress
from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint
from pipeline.quant.source import load_model
from pipeline.run import run
from pipeline.stages.fetch import link_local
from pipeline.verification import Report, VerifyOptions, compare, write_report
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.foreign_checkpoints import write_foreign
from tests.run_views import Recorder
from tests.tiny import write_tiny_llama
from tests.tiny_text import made_up_texts, write_tiny_tokenizer
from tests.unit.test_pickled import as_pickles

QUIET = SilentProgress()
LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)


def foreign_build(root: Path, method: str, **quantize: Any) -> Path:
    """The tiny build, started from weights that `method` quantized; YAML keys as given."""
    config = write_build(root, fmt="int4_awq")
    shutil.move(root / "weights", root / "plain")
    write_foreign(root / "plain", root / "weights", method=method)
    data = yaml.safe_load(config.read_text())
    data["quantize"] |= quantize
    config.write_text(yaml.safe_dump(data, sort_keys=False))
    return config


def plan_of(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests())


@pytest.mark.parametrize(
    ("method", "fmt"), [("awq", "int4_awq"), ("gptq", "int4_gptq"), ("awq", "int4_gptq")]
)
def test_nothing_is_quantized_again(tmp_path: Path, method: str, fmt: str) -> None:
    plan = plan_of(foreign_build(tmp_path, method, format=fmt), tmp_path)
    assert plan.problems == ()
    assert [step.stage.name for step in plan.steps] == [
        *("fetch", "convert", "build", "verify", "serve")
    ]
    assert plan.step("convert").inputs == {"checkpoint": "fetch"}
    assert plan.forecast is not None
    plain = plan_of(write_build(tmp_path / "p", fmt="fp16"), tmp_path)
    assert plain.forecast is not None
    assert plan.forecast.rank_bytes[0] < plain.forecast.rank_bytes[0]


@pytest.mark.parametrize(
    ("method", "quantize", "text"),
    [
        (
            "awq",
            {"format": "fp16"},
            "quantize.format: fp16, but AutoAWQ has quantized the source already; allowed: int4_awq or "
            "int4_gptq; fix: say what the source is, and it is not quantized again",
        ),
        (
            "gptq",
            {"format": "int4_awq"},
            "quantize.format: int4_awq, but GPTQ has quantized the source already; allowed: int4_gptq",
        ),
        (
            "awq",
            {"group_size": 128},
            "quantize.group_size: 128, but the source has groups of 64; allowed: 64",
        ),
    ],
)
def test_a_yaml_that_contradicts_the_source(
    tmp_path: Path, method: str, quantize: dict[str, Any], text: str
) -> None:
    config = foreign_build(tmp_path, method, **quantize)
    problems = [str(problem) for problem in plan_of(config, tmp_path).config_problems]
    assert any(text in problem and "tiny.yaml:" in problem for problem in problems), problems


def test_every_problem_of_the_foreign_header_is_in_the_plan(tmp_path: Path) -> None:
    config = foreign_build(tmp_path, "gptq", format="int4_gptq")
    path = tmp_path / "weights" / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= {"desc_act": True, "bits": 8}
    path.write_text(json.dumps(content))
    text = "\n".join(map(str, plan_of(config, tmp_path).checkpoint_problems))
    assert "desc_act True: input features would be reordered at run time" in text
    assert "bits 8; allowed: 4" in text


def test_padding_in_the_plan(tmp_path: Path) -> None:
    config = write_build(tmp_path, fmt="fp16", mapping={"tp": 3, "pad_ffn": True})
    texts = [str(problem) for problem in plan_of(config, tmp_path).problems]
    assert not any("intermediate_size" in text for text in texts), texts
    config = write_build(tmp_path, fmt="fp16", mapping={"tp": 3})
    texts = [str(problem) for problem in plan_of(config, tmp_path).problems]
    assert any("intermediate_size 256 cannot be shared out evenly" in text for text in texts), texts


def test_a_whole_build_from_autoawq(tmp_path: Path) -> None:
    """Asymmetric, kept exactly: the engine and the dequantized source agree as float32 allows."""
    config = foreign_build(tmp_path, "awq")
    result = run(load_config(config), Workspace(tmp_path), Recorder())
    assert result.executed == ("fetch", "convert", "build", "verify", "serve")
    report = json.loads((result.engine_dir / "report.json").read_text())
    assert report["original_quantized_by"] == "awq"
    assert report["quant_algo"] == "W4A16_GPTQ"
    assert report["max_kl"] < 1e-8  # observed 1.4e-11 nats
    page = (result.engine_dir / "report.html").read_text()
    assert "The build started from weights that awq had quantized already." in page


def compared(source: Path, work_dir: Path, options: ConvertOptions) -> Report:
    converted, engine = work_dir / "converted", work_dir / "engine"
    converted.mkdir(parents=True)
    engine.mkdir()
    convert_checkpoint(source, converted, tp=1, pp=1, progress=QUIET, options=options)
    export_network(converted, 0, engine, LIMITS, QUIET)
    write_engine_config(converted, engine, LIMITS)
    windows = VerifyOptions(num_windows=2, seq_len=32, gates=None)
    report = compare(source, engine, made_up_texts(12, seed=7), windows, QUIET, work_dir)
    write_report(report, work_dir)
    return report


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(write_tiny_llama(tmp_path_factory.mktemp("plain")))


def test_pytorch_files_need_no_safetensors(plain: Path, tmp_path: Path) -> None:
    """fetch links them; convert and verify read them."""
    source = as_pickles(plain, tmp_path / "hf", num_files=2)
    (tmp_path / "linked").mkdir()
    link_local(source, tmp_path / "linked")
    assert len(list((tmp_path / "linked").glob("*.bin"))) == 2
    report = compared(tmp_path / "linked", tmp_path / "work", ConvertOptions())
    assert report.original_quantized_by is None
    assert report.max_kl < 1e-8  # observed 1.5e-13 nats


@pytest.mark.parametrize("method", ["gptq", "gptq_v2"])
def test_gptq_computes_what_it_means(plain: Path, tmp_path: Path, method: str) -> None:
    write_foreign(plain, tmp_path / "hf", method=method)
    report = compared(tmp_path / "hf", tmp_path / "work", ConvertOptions())
    assert report.original_quantized_by == "gptq"
    assert report.max_kl < 1e-8  # observed 7e-12
    lossy = compared(
        tmp_path / "hf", tmp_path / "lossy", ConvertOptions(requantize_asymmetric=True)
    )
    assert lossy.quant_algo == "W4A16_AWQ"
    assert lossy.mean_kl > 1e-3  # observed 0.05: random codes are hard to round again


def test_a_model_with_biases(tmp_path: Path) -> None:
    """Qwen2: the biases of q, k and v are added after the correction, and are not int4."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-1, 1)
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.half().save_pretrained(tmp_path / "plain")
    write_tiny_tokenizer(tmp_path / "plain")
    write_foreign(tmp_path / "plain", tmp_path / "hf", method="gptq")
    report = compared(tmp_path / "hf", tmp_path / "work", ConvertOptions())
    assert report.max_kl < 1e-8  # observed 2e-13


def test_modelopt_computes_what_it_means(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    options = QuantizeOptions("int4_awq", 64, num_samples=4, seq_len=32, batch_size=2)
    quantize_checkpoint(plain, tmp_path / "hf", options, made_up_texts(20), QUIET)
    report = compared(tmp_path / "hf", tmp_path / "work", ConvertOptions())
    assert report.original_quantized_by == "modelopt"
    # The engine's scales are float16, those of ModelOpt float32.
    assert report.mean_kl < 1e-6  # observed 7.5e-8


def test_dequantized_weights_are_the_model(plain: Path, tmp_path: Path) -> None:
    """Against a plain checkpoint that holds the dequantized weights, loaded by transformers itself."""
    from safetensors.numpy import load_file, save_file

    linears = write_foreign(plain, tmp_path / "hf", method="awq")
    shutil.copytree(plain, tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    for module, linear in linears.items():
        tensors[f"{module}.weight"] = linear.weight().astype(np.float32)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        found, expected = (
            load_model(tmp_path / name, torch.float32)(input_ids=ids).logits
            for name in ("hf", "dense")
        )
    assert torch.equal(found, expected)
