"""The kit of backend tensorrt. TensorRT is TensorRT-RTX under its name here: no GPU, the same API."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.engine.tensorrt_request import PlanOptions, TensorRtRequest
from pipeline.network import BuildLimits, export_network
from pipeline.packaging import NetworkKit, write_kit
from pipeline.plan import Plan, make_plan
from pipeline.progress import SilentProgress
from pipeline.targets import TARGETS
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.machines import AMPLE
from tests.rank_checkpoints import write_random_rank
from tests.trtllm_stand_in import GpuHost

LIMITS = BuildLimits(max_batch_size=2, max_seq_len=64, max_input_len=32)
_MODULE = """\
from tensorrt_rtx_bindings import *
__version__ = "{version}"
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kit")
    checkpoint = write_random_rank(root / "checkpoint", quantized=True)
    engine = root / "engine"
    engine.mkdir()
    export_network(checkpoint, 0, engine, LIMITS, SilentProgress())
    (engine / "config.json").write_text("{}")
    out = root / "kit"
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "tokenizer.json").write_text("{}")
    write_kit(
        NetworkKit(
            name="tiny",
            target=TARGETS["rtx4090"],
            world_size=1,
            workers=1,
            config_yaml="name: tiny\n",
            checkpoint_dir=checkpoint,
            image="",
            engine_dir=engine,
            requests=[TensorRtRequest(0, "rtx4090", LIMITS, PlanOptions()).to_json()],
        ),
        out,
    )
    return out


def _host(root: Path, version: str) -> GpuHost:
    """Its python3 has numpy, ml_dtypes and a `tensorrt` of that version."""
    host = GpuHost(root, sm="8.9")
    package = root / "site" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_MODULE.format(version=version))
    (host.bin / "python3").unlink()
    path = f'PYTHONPATH="$PYTHONPATH:{package.parent}"'
    host.program("python3", f'#!/bin/sh\n{path} exec {sys.executable} "$@"\n')
    return host


def _build(kit: Path, host: GpuHost, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(kit / "build.sh"), *arguments]
    return subprocess.run(
        command, env=host.environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed",
)
def test_a_build_on_the_host(kit: Path, tmp_path: Path) -> None:
    done = _build(kit, _host(tmp_path, "11.4.0.106"), "host", str(tmp_path / "engine"))
    assert done.returncode == 0, done.stderr
    assert "rank 0: built with TensorRT 11.4.0.106" in done.stderr
    assert (tmp_path / "engine" / "rank0.engine").read_bytes()[:4] == b"vtrt"
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names >= {"config.json", "rank0.engine", "tokenizer"}


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed",
)
def test_a_version_that_cannot_build_it(kit: Path, tmp_path: Path) -> None:
    done = _build(kit, _host(tmp_path, "10.15.1.29"), "host", str(tmp_path / "engine"))
    assert done.returncode == 5
    assert "TensorRT 10.15.1.29 has no attention with lengths of rows" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "venv"]


def test_without_tensorrt(kit: Path, tmp_path: Path) -> None:
    done = _build(kit, GpuHost(tmp_path, sm="8.9"), "host", str(tmp_path / "engine"))
    assert done.returncode == 4
    assert "error: python3 has no tensorrt" in done.stderr
    assert _build(kit, GpuHost(tmp_path / "2", sm="8.9"), "container").returncode != 0


def test_the_worker_needs_no_more_than_numpy(kit: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import pipeline.engine.tensorrt_worker as worker;"
        "names = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(worker.__file__, *sorted(names - set(sys.stdlib_module_names)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=kit, capture_output=True, text=True, check=True)
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(kit)
    outside = {name for name in names if "cython" not in name}
    assert outside <= {"pipeline", "numpy", "ml_dtypes"}


def _plan(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests(), AMPLE)


def test_the_network_is_verified_where_it_cannot_be_compiled(tmp_path: Path) -> None:
    config = write_build(tmp_path, fmt="fp16", backend="tensorrt")
    plan = _plan(config, tmp_path)
    assert [step.stage.name for step in plan.steps] == [
        "fetch",
        "convert",
        "build",
        "verify",
        "kit",
    ]
    assert plan.problems == ()
    assert "tensorrt is not installed here: the run ends with a build kit" in plan.notes
    other = tmp_path / "cpu.yaml"
    other.write_text(yaml.safe_dump({"extends": "tiny.yaml", "build": {"backend": "onnxruntime"}}))
    keys = {}
    for path in (config, other):
        actions = {step.stage.name: step.action for step in _plan(path, tmp_path).steps}
        build = actions["build"]
        assert build is not None
        keys[path] = build.key
    assert keys[config] == keys[other]
