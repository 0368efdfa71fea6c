"""Backend tensorrt_llm from the YAML to engines/, with a stand-in for trtllm-build; and its kit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.build_config import BuildConfig
from pipeline.config import load_config
from pipeline.engine.trtllm_build import EngineOrder, build_engines, checkpoint_subject
from pipeline.engine.trtllm_environment import HostTool, ImageTool, find_tool
from pipeline.errors import GateError, PipelineError, StageError, ToolError
from pipeline.plan import Plan, make_plan
from pipeline.run import run
from pipeline.stages import STAGES
from pipeline.tensorrt_llm_config import ImageEnvironment
from pipeline.workspace import Workspace
from tests.build_config import write_build
from tests.machines import AMPLE
from tests.processes import ends_soon
from tests.run_views import Recorder
from tests.trtllm_stand_in import GpuHost, mapping_config


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for two H100."""
    path = write_build(tmp_path_factory.mktemp("build"))
    data = yaml.safe_load(path.read_text())
    data |= {"target": "h100-80gb", "quantize": {"format": "fp16"}, "mapping": {"tp": 2}}
    data["build"] = {"backend": "tensorrt_llm", "max_batch_size": 2}
    data["build"] |= {"max_input_len": 32, "max_seq_len": 64, "tensorrt_llm": {"workers": 2}}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def _variant(build: Path, **section: Any) -> Path:
    data = {"extends": build.name, "build": {"tensorrt_llm": section}}
    path = build.parent / "variant.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def _plan(config: Path, root: Path) -> Plan:
    workspace = Workspace(root)
    return make_plan(load_config(config), workspace.store, workspace.digests(), AMPLE)


@pytest.fixture(scope="module")
def h100(tmp_path_factory: pytest.TempPathFactory) -> GpuHost:
    return GpuHost(tmp_path_factory.mktemp("host"))


@pytest.fixture
def on_h100(h100: GpuHost, monkeypatch: pytest.MonkeyPatch) -> GpuHost:
    """This process is on that host."""
    h100.behave("works")
    monkeypatch.setenv("PATH", f"{h100.bin}:{os.environ['PATH']}")
    return h100


def test_a_kit_here_and_an_engine_there(
    build: Path, tmp_path: Path, h100: GpuHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _plan(build, tmp_path)
    assert [step.stage.name for step in plan.steps] == ["fetch", "convert", "kit"]
    assert plan.problems == ()
    note = "trtllm-build is not installed here: the run ends with a build kit"
    assert note in plan.notes
    result = run(load_config(build), Workspace(tmp_path), Recorder())
    assert result.repository_dir is None
    kit = result.engine_dir / "build-kit"
    done = subprocess.run(
        [str(kit / "build.sh"), "host", str(tmp_path / "there")],
        env=h100.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = {path.name for path in (tmp_path / "there").iterdir()}
    assert built == {"config.json", "model.cache", "rank0.engine", "rank1.engine", "tokenizer"}
    resolved = yaml.safe_load((kit / "config.yaml").read_text())
    assert resolved["build"]["tensorrt_llm"]["max_beam_width"] == 1
    kit_call = h100.calls()[-1]

    # The same YAML on the host itself: the same flags, and only the build is left to do.
    monkeypatch.setenv("PATH", f"{h100.bin}:{os.environ['PATH']}")
    view = Recorder()
    result = run(load_config(build), Workspace(tmp_path), view)
    assert result.executed == ("build",)
    names = {path.name for path in result.engine_dir.iterdir()}
    assert names == built | {"manifest.json"}
    own_call = h100.calls()[-1]
    assert _flags(own_call) == _flags(kit_call)
    manifest = json.loads((result.engine_dir / "manifest.json").read_text())
    assert manifest["identity"]["compiler"] == "tensorrt_llm"
    assert manifest["identity"]["version"] == "1.2.1"
    assert manifest["identity"]["sms"] == [90]


def _flags(call: list[str]) -> list[str]:
    return call[call.index("--max_batch_size") :]


def test_keys(build: Path, tmp_path: Path, on_h100: GpuHost) -> None:
    def subset(path: Path) -> dict[str, Any]:
        return dict(STAGES["build"].config_subset(load_config(path)))

    usual = subset(build)
    assert usual["tensorrt_llm"]["version"] == "1.2.1"
    neutral = _variant(build, workers=1, log_level="error", timing_cache="a.cache")
    assert subset(neutral) == usual
    assert subset(_variant(build, environment={"venv": str(on_h100.venv)})) == usual
    assert subset(_variant(build, tokens_per_block=64)) != usual
    assert "tensorrt" not in usual
    other = build.parent / "other.yaml"
    keys = []
    for block in (32, 64):
        options = {"tensorrt_llm": {"tokens_per_block": block}, "tensorrt": {"refit": block == 64}}
        data = {"extends": build.name, "build": {"backend": "tensorrt_rtx", **options}}
        other.write_text(yaml.safe_dump(data))
        keys.append(subset(other))
    assert keys[0] == keys[1]
    assert "tensorrt_llm" not in keys[0]


def test_a_kit_does_not_depend_on_the_machine_that_packs_it(build: Path) -> None:
    other = build.parent / "other.yaml"

    def subset(**sections: object) -> dict[str, Any]:
        other.write_text(yaml.safe_dump({"extends": build.name, "name": "llama", **sections}))
        return STAGES["kit"].config_subset(load_config(other))

    usual = subset()
    assert subset(build={"launch": "mpirun", "hostfile": "hosts", "max_memory_gb": 3.0}) == usual
    assert subset(quantize={"max_memory_gb": 3.0}, run={"keep": "needed"}) == usual
    assert subset(build={"max_batch_size": 1}) != usual


def test_problems_of_flags_have_their_line(build: Path, tmp_path: Path) -> None:
    plan = _plan(_variant(build, use_paged_context_fmha=True, streamingllm=True), tmp_path)
    (problem,) = plan.problems
    assert problem.where.endswith("build.tensorrt_llm.use_paged_context_fmha")
    assert "variant.yaml:" in problem.where


def test_another_gpu_and_a_version_without_the_flow(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = GpuHost(tmp_path, version="1.3.0rc22", sm="8.9")
    monkeypatch.setenv("PATH", f"{host.bin}:{os.environ['PATH']}")
    what = [problem.what for problem in _plan(build, tmp_path).problems]
    assert what == [
        "h100-80gb is SM90, here is NVIDIA H100 (SM89)",
        "TensorRT-LLM 1.3.0rc22 has no trtllm-build for checkpoints any more: removed in July "
        "2026, from 1.3.0rc21 on",
    ]


@pytest.fixture
def order(tmp_path: Path) -> EngineOrder:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(mapping_config(2, 2)))
    for rank in range(2):
        (checkpoint / f"rank{rank}.safetensors").write_bytes(bytes([rank]) * 10)
    return EngineOrder(checkpoint, ["--max_batch_size", "4"], 1, None, "1.2.1")


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("lacks a rank", GateError, "rank1.engine missing or empty"),
        ("other version", GateError, "was written by TensorRT-LLM 9.9.9; allowed: 1.2.1"),
        ("fails", StageError, "trtllm-build: ended with code 1; the end of its log:"),
        (
            "no libraries",
            ToolError,
            "trtllm-build --help ended with code 1: libnvinfer.so.10: cannot open shared object file",
        ),
    ],
)
def test_what_is_not_whole_is_not_taken(
    order: EngineOrder,
    tmp_path: Path,
    h100: GpuHost,
    mode: str,
    kind: type[PipelineError],
    message: str,
) -> None:
    h100.behave(mode)
    out = tmp_path / "out"
    out.mkdir()
    tool = HostTool(h100.bin / "trtllm-build", h100.bin / "python")
    with pytest.raises(kind) as caught:
        build_engines(tool, order, out, tmp_path / "log")
    assert message in str(caught.value)
    assert list(out.glob("rank*")) == []


def test_the_tool_ends_with_the_one_that_waits_for_it(
    order: EngineOrder, tmp_path: Path, h100: GpuHost
) -> None:
    h100.behave("hangs")
    (tmp_path / "out").mkdir()
    code = (
        "import pathlib\nfrom pipeline.engine.trtllm_build import EngineOrder, build_engines\n"
        "from pipeline.engine.trtllm_environment import HostTool\n"
        f"root, bin = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(h100.bin)!r})\n"
        f"order = EngineOrder(root / 'checkpoint', {list(order.arguments)}, 1, None, '1.2.1')\n"
        "tool = HostTool(bin / 'trtllm-build', bin / 'python')\n"
        "build_engines(tool, order, root / 'out', root / 'log')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    hanging = h100.bin / "hanging"
    while not (hanging.exists() and hanging.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert ends_soon(int(hanging.read_text()))


def test_a_flag_that_the_tool_does_not_know(
    order: EngineOrder, tmp_path: Path, h100: GpuHost
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    h100.behave("works")
    unknown = EngineOrder(order.checkpoint_dir, ["--auto_parallel", "2"], 1, None, "1.2.1")
    tool = HostTool(h100.bin / "trtllm-build", h100.bin / "python")
    with pytest.raises(ToolError, match="does not know --auto_parallel; fix: use TensorRT-LLM 1"):
        build_engines(tool, unknown, out, tmp_path / "log")


def test_where_the_tool_is(on_h100: GpuHost, tmp_path: Path) -> None:
    tool = find_tool("current", Path)
    assert isinstance(tool, HostTool)
    assert tool.version() == "1.2.1"
    on_h100.program("docker", "#!/bin/sh\nexit 1\n")
    image = find_tool(ImageEnvironment(image="example/image:1.2.1"), Path)
    assert isinstance(image, ImageTool)
    command = image.command([tmp_path], tmp_path)
    assert command[1:9] == [
        "run",
        "--rm",
        "--init",
        "--gpus",
        "all",
        "--shm-size",
        "1g",
        "--ulimit",
    ]
    assert command[-4:] == ["--workdir", str(tmp_path), "example/image:1.2.1", "trtllm-build"]
    assert command[command.index("--volume") + 1] == f"{tmp_path}:{tmp_path}"
    with pytest.raises(ToolError):
        image.version()


def test_what_flags_depend_on_is_read_from_a_mixed_checkpoint(tmp_path: Path) -> None:
    config = mapping_config(2, 2)
    config["quantization"] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layers = {"a": {"quant_algo": "W4A16_AWQ"}, "b": {"quant_algo": "FP8"}}
    (tmp_path / "quant_cfg.json").write_text(json.dumps({"quantized_layers": layers}))
    subject = checkpoint_subject(BuildConfig(), 90, tmp_path)
    assert (subject.format, subject.parts) == ("mixed", ("fp8", "int4_awq"))
    assert (subject.kv_cache, subject.tp, subject.world_size) == ("fp8", 2, 2)
