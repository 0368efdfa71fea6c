"""A rehearsal reads less text than the YAML asks for, in every stage and key, and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import LoadedConfig, load_config
from pipeline.plan import Plan, make_plan
from pipeline.stages.worker import Job
from pipeline.weights import override_weights
from pipeline.workspace import Workspace
from tests.build_config import SHAPE, write_build

NOTE = (
    "rehearsal: 4 samples of 128 tokens instead of 96 of 512 to calibrate, "
    "2 windows of 128 tokens instead of 64 of 256 to verify"
)


def _load(tmp_path: Path, name: str = "full", **sections: object) -> LoadedConfig:
    data = {"model": {"source": "synthetic", "shape": SHAPE}, "name": "same", **sections}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_config(path)


def _plan(loaded: LoadedConfig, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(loaded, workspace.store, workspace.digests())


def _keys(loaded: LoadedConfig, root: Path) -> dict[str, str]:
    plan = _plan(loaded, root)
    assert plan.problems == ()
    return {step.stage.name: step.action.key for step in plan.steps if step.action is not None}


FULL = {"quantize": {"calibration": {"num_samples": 96, "seq_len": 512}}}


def test_keys_are_those_of_a_yaml_that_says_it(tmp_path: Path) -> None:
    said = _load(
        tmp_path,
        "said",
        quantize={"calibration": {"num_samples": 4, "seq_len": 128}},
        verify={"num_windows": 2, "seq_len": 128},
    )
    keys = _keys(_load(tmp_path, **FULL), tmp_path)
    assert set(keys) == {"fetch", "quantize", "convert", "build", "verify", "serve"}
    assert keys == _keys(said, tmp_path)
    assert said.rehearsal_note == ""


def test_the_plan_says_what_is_less(tmp_path: Path) -> None:
    assert NOTE in _plan(_load(tmp_path, **FULL), tmp_path).notes


@pytest.mark.parametrize(
    ("sections", "note"),
    [
        ({"build": {"backend": "none"}}, NOTE.partition(", ")[0]),
        ({"quantize": {"format": "fp16"}}, f"rehearsal: {NOTE.partition(', ')[2]}"),
        ({"quantize": {"format": "fp16"}, "build": {"backend": "none"}}, ""),
    ],
)
def test_the_note_names_stages_that_run(
    tmp_path: Path, sections: dict[str, object], note: str
) -> None:
    assert _load(tmp_path, **{**FULL, **sections}).rehearsal_note == note


def test_never_more_than_the_yaml_asks_for(tmp_path: Path) -> None:
    loaded = _load(
        tmp_path,
        quantize={"calibration": {"num_samples": 3, "seq_len": 64}},
        verify={"num_windows": 1, "seq_len": 32},
    )
    assert loaded.config == loaded.written
    assert loaded.rehearsal_note == ""


def test_sizes_are_the_yaml_s(tmp_path: Path) -> None:
    loaded = _load(
        tmp_path,
        rehearsal={"num_samples": 8, "seq_len": 32, "num_windows": 3, "window_len": 16},
    )
    calibration, verify = loaded.config.quantize.calibration, loaded.config.verify
    assert (calibration.num_samples, calibration.seq_len) == (8, 32)
    assert (verify.num_windows, verify.seq_len) == (3, 16)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        (
            {"quantize": {"calibration": {"seq_len": 2048}}},
            "quantize.calibration.seq_len: 2048 is more than the model's max_position_embeddings",
        ),
        (
            {"verify": {"seq_len": 1000}, "build": {"max_seq_len": 600}},
            "verify.seq_len: 1000 does not fit the engine; allowed: at most build.max_seq_len, 600",
        ),
    ],
)
def test_a_rehearsal_hides_no_mistake(
    tmp_path: Path, sections: dict[str, object], problem: str
) -> None:
    """It is refused for what would stop the build that it stands for."""
    texts = map(str, _plan(_load(tmp_path, **sections), tmp_path).problems)
    assert any(problem in text for text in texts)


def test_real_weights_read_it_all(tmp_path: Path) -> None:
    """Also instead of the synthetic ones that the YAML names."""
    build = write_build(tmp_path)
    weights = str(build.parent / "weights")
    loaded = override_weights(_load(tmp_path, **FULL), weights)
    assert not loaded.rehearsal
    assert loaded.config == loaded.written
    assert loaded.config.quantize.calibration.num_samples == 96
    rehearsal = override_weights(load_config(build), "synthetic")
    assert rehearsal.rehearsal
    assert rehearsal.config.verify.num_windows == 2


def test_a_stage_gets_the_same_values(tmp_path: Path) -> None:
    loaded = _load(tmp_path, **FULL)
    job = Job(
        stage="verify",
        loaded=loaded,
        inputs={},
        out_dir=tmp_path,
        log_path=tmp_path,
        report_fd=0,
        parent_pid=0,
    )
    assert Job.model_validate_json(job.model_dump_json()).loaded == loaded


def test_the_run_says_it(tmp_path: Path) -> None:
    calibration = {"num_samples": 5, "seq_len": 64, "batch_size": 2}
    _load(
        tmp_path,
        quantize={"group_size": 64, "algorithm": "rtn", "calibration": calibration},
        build={"backend": "none"},
        rehearsal={"num_samples": 2, "seq_len": 16},
    )
    command = [sys.executable, "-m", "pipeline", "run", "full.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    note = "rehearsal: 2 samples of 16 tokens instead of 5 of 64 to calibrate"
    assert note in done.stderr.replace("\n", " ")
    (report,) = (tmp_path / "engines" / ".store").glob("quantize/*/quant_report.json")
    windows = json.loads(report.read_text())["calibration"]
    assert (windows["num_windows"], windows["seq_len"]) == (2, 16)
    manifest = json.loads((tmp_path / "engines" / "same" / "manifest.json").read_text())
    assert manifest["config"]["quantize"]["calibration"]["num_samples"] == 2
