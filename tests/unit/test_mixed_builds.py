"""Mixed precision from the YAML: what decides the artifact, and a whole build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.run import run
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.run_views import Recorder

MIXED = {"format": "mixed", "budget": "6 bits"}


def subset(root: Path, quantize: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = write_build(root, quantize={"format": "int4_awq", **quantize}, **sections)
    return STAGES["quantize"].config_subset(load_config(config))


def test_the_target_decides_only_what_may_be_mixed(tmp_path: Path) -> None:
    rtx = {"backend": "tensorrt_rtx"}
    old, new = (subset(tmp_path, MIXED, target=name, **rtx) for name in ("a10", "rtx4090"))
    assert old["candidates"] == ["int4_awq", "int8_wo", "fp16"]
    assert new["candidates"] == ["int4_awq", "int8_wo", "fp8", "fp16"]
    assert subset(tmp_path, MIXED, target="l4", **rtx) == new
    assert subset(tmp_path, {}, target="a10", **rtx) == subset(tmp_path, {}, target="l4", **rtx)
    assert subset(tmp_path, {}) == subset(tmp_path, {"sensitivity": "kl"})
    assert subset(tmp_path, MIXED) != subset(tmp_path, {**MIXED, "sensitivity": "kl"})


@pytest.mark.slow
def test_a_build_by_budget(tmp_path: Path) -> None:
    config = write_build(tmp_path, quantize=MIXED)
    run(load_config(config), Workspace(tmp_path), Recorder())
    (quantized,) = (tmp_path / "engines" / ".store" / "quantize").glob("*/sensitivity.json")
    record = json.loads(quantized.read_text())
    chosen = {group["chosen"] for group in record["groups"]}
    assert {"int4_awq", "int8_wo"} <= chosen
    assert 5.5 < record["mean_bits"] <= 6
    facts = json.loads((quantized.parent / "manifest.json").read_text())["facts"]
    assert facts["mixed"]["mean_bits"] == record["mean_bits"]
    report = json.loads((tmp_path / "engines" / "tiny" / "report.json").read_text())
    assert report["mean_kl"] < 1
