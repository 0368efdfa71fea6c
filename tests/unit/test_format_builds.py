"""Whole builds in every format that the quantize stage makes, from plain weights to a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.run import run
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder

pytestmark = pytest.mark.slow

# Format -> quant_algo and a limit of the mean KL divergence; seen values behind it.
BUILDS = {
    "int8_wo": ("W8A16", 5e-4),  # 8.3e-5
    "int8_sq": ("W8A8_SQ_PER_CHANNEL", 1e-3),  # 2.2e-4
    "fp8": ("FP8", 1e-2),  # 2.4e-3
    "int4_gptq": ("W4A16_GPTQ", 1e-2),  # 1.4e-3
    "w4a8_awq": ("W4A8_AWQ", 6e-2),  # 1.9e-2
}


@pytest.mark.parametrize("fmt", BUILDS)
def test_a_whole_build(tmp_path: Path, fmt: str) -> None:
    result = run(load_config(write_build(tmp_path, fmt=fmt)), Workspace(tmp_path), Recorder())
    assert result.executed == ("fetch", "quantize", "convert", "build", "verify", "serve")
    report = json.loads((result.engine_dir / "report.json").read_text())
    algorithm, limit = BUILDS[fmt]
    assert report["quant_algo"] == algorithm
    assert 0 < report["mean_kl"] < limit


@pytest.mark.parametrize(
    ("quantize", "algorithm", "kv_cache"),
    [
        ({"format": "fp8", "kv_cache": "fp8"}, "FP8", "FP8"),
        ({"format": "int8_wo", "kv_cache": "int8"}, "W8A16", "INT8"),
    ],
)
def test_a_checkpoint_with_cache_scales(
    tmp_path: Path, quantize: dict[str, Any], algorithm: str, kv_cache: str
) -> None:
    config = write_build(tmp_path, backend="none", quantize=quantize)
    result = run(load_config(config), Workspace(tmp_path), Recorder())
    assert result.executed == ("fetch", "quantize", "convert")
    found = json.loads((result.engine_dir / "config.json").read_text())["quantization"]
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == (algorithm, kv_cache)
