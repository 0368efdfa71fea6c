"""Models of the Hub that are quantized already: planned from `model.shape`, checked when here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.plan import Plan, make_plan
from pipeline.stages import source_format
from pipeline.workspace import Workspace
from tests.foreign_checkpoints import declaration, write_foreign
from tests.hub import LocalHub, serve_hub
from tests.tiny import write_tiny_llama
from tests.tiny_text import write_tiny_tokenizer

ID, REVISION = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_llama(tmp_path_factory.mktemp("hub") / "plain")
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def awq(plain: Path) -> Path:
    write_foreign(plain, plain.parent / "awq", method="awq")
    return plain.parent / "awq"


def write_config(root: Path, shape: dict[str, Any] | None = None, **quantize: Any) -> Path:
    model: dict[str, Any] = {"source": "hub", "id": ID, "revision": REVISION}
    if shape is not None:
        model["shape"] = shape
    data = {
        "model": model,
        "quantize": {"format": "int4_awq", "group_size": 64, **quantize},
        "build": {"backend": "none", "max_input_len": 32, "max_seq_len": 64},
    }
    path = root / "hub.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def plan_of(config: Path) -> Plan:
    workspace = Workspace(config.parent)
    return make_plan(load_config(config), workspace.store, workspace.digests())


def names(plan: Plan) -> list[str]:
    return [step.stage.name for step in plan.steps]


def config_of(directory: Path, **fields: Any) -> dict[str, Any]:
    return {**json.loads((directory / "config.json").read_text()), **fields}


def trtpipe(verb: str, config: Path, hub: LocalHub) -> tuple[int, dict[str, Any]]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(config.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "pipeline", verb, str(config), "--json"]
    done = subprocess.run(
        command, env=environment, cwd=config.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_planned_from_the_shape_without_a_download(tmp_path: Path, awq: Path) -> None:
    plan = plan_of(write_config(tmp_path, config_of(awq)))
    assert plan.problems == ()
    assert names(plan) == ["fetch", "convert"]
    assert plan.forecast is not None
    plan_fp16 = plan_of(write_config(tmp_path, config_of(awq, quantization_config=None)))
    assert names(plan_fp16) == ["fetch", "quantize", "convert"]


def test_what_would_be_ignored_is_refused(tmp_path: Path, awq: Path) -> None:
    quantize = {"algorithm": "awq_clip", "keep": ["*.down_proj"], "kv_cache": "fp8"}
    plan = plan_of(write_config(tmp_path, config_of(awq), **quantize))
    done = "nothing is quantized here: AutoAWQ has done it already; fix: remove it"
    assert [str(problem).partition(": quantize.")[2] for problem in plan.problems] == [
        f"algorithm: {done}",
        f"keep: {done}",
        "kv_cache: fp8, but AutoAWQ has quantized the source already, without its scales; "
        "allowed: fp16",
    ]


def test_a_shape_of_modelopt(tmp_path: Path, plain: Path) -> None:
    declared = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_AWQ",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}},
    }
    shape = config_of(plain, quantization_config=declared)
    assert plan_of(write_config(tmp_path, shape)).problems == ()
    (problem,) = plan_of(write_config(tmp_path, shape, group_size=128)).problems
    assert "quantize.group_size: 128, but the source has groups of 64; allowed: 64" in str(problem)


@pytest.mark.parametrize(
    ("declared", "quantize", "text"),
    [
        (
            declaration("awq", 64, False),
            {"format": "fp16"},
            "quantize.format: fp16, but AutoAWQ has quantized the source already; allowed: int4_awq or",
        ),
        (
            declaration("gptq", 64, False),
            {},
            "quantize.format: int4_awq, but GPTQ has quantized the source already; allowed: int4_gptq",
        ),
        (
            {**declaration("gptq", 64, False), "desc_act": True},
            {"format": "int4_gptq"},
            "config.json: quantization_config: desc_act True: input features would be reordered",
        ),
        (
            {"quant_method": "bitsandbytes"},
            {},
            "config.json: quantization_config: quant_method 'bitsandbytes' is not supported; allowed: ",
        ),
    ],
)
def test_a_shape_that_does_not_fit_the_yaml(
    tmp_path: Path, plain: Path, declared: Any, quantize: dict[str, Any], text: str
) -> None:
    config = write_config(tmp_path, config_of(plain, quantization_config=declared), **quantize)
    problems = [str(problem) for problem in plan_of(config).problems]
    assert any(text in problem for problem in problems), problems


@pytest.mark.parametrize("with_shape", [True, False])
def test_a_quantized_model_is_converted_as_it_is(
    tmp_path: Path, awq: Path, with_shape: bool
) -> None:
    """Without the shape nobody knows before the download: then the quantize stage falls away."""
    config = write_config(tmp_path, config_of(awq) if with_shape else None)
    with serve_hub(LocalHub(awq, ID, REVISION)) as hub:
        code, result = trtpipe("run", config, hub)
        assert code == 0, result
        assert result["executed"] == ["fetch", "convert"]
        assert names(plan_of(config)) == ["fetch", "convert"]
        assert trtpipe("run", config, hub)[1]["executed"] == []
    built = json.loads((tmp_path / "engines" / "hub" / "config.json").read_text())
    assert built["quantization"]["has_zero_point"]


@pytest.mark.parametrize(
    ("made_by", "shape_by", "quantize", "text"),
    [
        (
            "plain",
            "awq",
            {},
            "model.shape.quantization_config: int4_gptq by AutoAWQ with groups of 64, but the weights "
            "of someone/tiny are plain",
        ),
        (
            "awq",
            "plain",
            {},
            "model.shape.quantization_config: plain, but the weights of someone/tiny are int4_gptq by "
            "AutoAWQ with groups of 64",
        ),
        ("awq", "", {"format": "fp16"}, "quantize.format: fp16, but AutoAWQ has quantized the"),
    ],
)
def test_weights_that_are_not_what_was_said(
    tmp_path: Path,
    plain: Path,
    awq: Path,
    made_by: str,
    shape_by: str,
    quantize: dict[str, Any],
    text: str,
) -> None:
    directories = {"plain": plain, "awq": awq}
    shape = config_of(directories[shape_by]) if shape_by else None
    config = write_config(tmp_path, shape, **quantize)
    with serve_hub(LocalHub(directories[made_by], ID, REVISION)) as hub:
        code, result = trtpipe("run", config, hub)
    assert code == 2
    whole = [f"{one['where']}: {one['what']}" for one in result["problems"]]
    assert any(text in problem and "hub.yaml:" in problem for problem in whole), whole
    assert not (tmp_path / "engines" / "hub").exists()


def test_the_config_is_read_once(
    tmp_path: Path, awq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = source_format.read_declared

    def counting(directory: Path, **options: Any) -> Any:
        reads.append(directory)
        return read(directory, **options)

    monkeypatch.setattr(source_format, "read_declared", counting)
    config = write_config(tmp_path)
    data = yaml.safe_load(config.read_text())
    data["model"] = {"source": "directory", "path": str(awq)}
    config.write_text(yaml.safe_dump(data))
    assert plan_of(config).problems == ()
    assert reads == [awq]
