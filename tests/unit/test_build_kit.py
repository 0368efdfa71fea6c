"""The kit's build.sh, run for real in a clean directory; trtllm-build is a stand-in."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.packaging import CheckpointKit, write_kit
from pipeline.targets import TARGETS
from tests.trtllm_stand_in import DOCKER, SBATCH, SRUN, GpuHost, mapping_config

ARGUMENTS = ("--max_batch_size", "4", "--max_seq_len", "1024", "--strip_plan")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of two ranks, copied to where it is used."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(mapping_config(2, 2)))
    for rank in range(2):
        (checkpoint / f"rank{rank}.safetensors").write_bytes(bytes([rank]) * 100)
    made = tmp_path / "made"
    (made / "tokenizer").mkdir(parents=True)
    (made / "tokenizer" / "tokenizer.json").write_text("{}")
    write_kit(
        CheckpointKit(
            name="llama",
            target=TARGETS["h100-80gb"],
            world_size=2,
            workers=2,
            config_yaml="name: llama\n",
            checkpoint_dir=checkpoint,
            image="example/image:1.2.1",
            arguments=ARGUMENTS,
        ),
        made,
    )
    return Path(shutil.copytree(made, tmp_path / "there" / "kit"))


@pytest.fixture
def host(tmp_path: Path) -> GpuHost:
    return GpuHost(tmp_path)


def _build(kit: Path, host: GpuHost, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(kit / "build.sh"), *arguments],
        env=host.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_build_on_the_host(kit: Path, host: GpuHost) -> None:
    done = _build(kit, host)
    assert done.returncode == 0, done.stderr
    engine = kit / "engine"
    assert sorted(path.name for path in engine.iterdir()) == [
        "config.json",
        "model.cache",
        "rank0.engine",
        "rank1.engine",
        "tokenizer",
    ]
    assert (engine / "rank1.engine").read_text() == hashlib.sha256(b"\1" * 100).hexdigest()
    assert (engine / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (call,) = host.calls()
    assert call[:4] == ["--workers", "2", "--checkpoint_dir", str(kit / "checkpoint")]
    assert call[-5:] == list(ARGUMENTS)
    assert "build.sh: line" not in done.stderr


def test_files_are_listed_and_checked(kit: Path, host: GpuHost) -> None:
    listed = {line.split("  ")[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert listed == there - {"SHA256SUMS"}
    (kit / "checkpoint" / "rank1.safetensors").write_bytes(b"\2" * 100)
    done = _build(kit, host)
    assert done.returncode == 6
    assert "checkpoint/rank1.safetensors: FAILED" in done.stderr
    assert "error: the kit is damaged or was changed; copy it again" in done.stderr
    assert host.calls() == []


@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("lacks a rank", 6, "rank1.engine is missing or empty"),
        ("other version", 6, "config.json is of another build"),
        ("fails", 5, "trtllm-build failed"),
    ],
)
def test_an_engine_that_is_not_whole_never_appears(
    kit: Path, host: GpuHost, mode: str, code: int, message: str
) -> None:
    before = sorted(kit.iterdir())
    host.behave(mode)
    done = _build(kit, host)
    assert (done.returncode, f"error: {message}" in done.stderr) == (code, True), done.stderr
    assert sorted(kit.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_leaves_nothing(kit: Path, host: GpuHost, number: int) -> None:
    before = sorted(kit.iterdir())
    host.behave("hangs")
    process = subprocess.Popen([str(kit / "build.sh")], env=host.environment())
    while not (host.bin / "hanging").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert sorted(kit.iterdir()) == before
    tool = f"{host.bin}/trtllm-build"
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert tool not in running.stdout


@pytest.mark.parametrize(
    ("version", "code", "message"),
    [
        ("0.16.0", 4, "error: TensorRT-LLM 0.16.0; allowed: 0.17 up to, not including, 1.3"),
        ("0.17.0.post1", 0, "built"),
        ("1.2.1", 0, "built"),
        ("1.3.0rc15", 0, "warning: TensorRT-LLM 1.3.0rc15: trtllm-build is deprecated there"),
        ("1.3.0rc21", 4, "error: TensorRT-LLM 1.3.0rc21; allowed"),
        ("1.3.0", 4, "error: TensorRT-LLM 1.3.0; allowed"),
        ("1.4.0rc1", 4, "error: TensorRT-LLM 1.4.0rc1; allowed"),
    ],
)
def test_versions(kit: Path, tmp_path: Path, version: str, code: int, message: str) -> None:
    done = _build(kit, GpuHost(tmp_path, version=version))
    assert done.returncode == code, done.stderr
    assert message in done.stderr + done.stdout


def test_another_gpu(kit: Path, tmp_path: Path) -> None:
    done = _build(kit, GpuHost(tmp_path, sm="8.9"))
    assert done.returncode == 4
    assert "for h100-80gb, compute capability 9.0; here is 8.9" in done.stderr


def test_without_the_tool(kit: Path, host: GpuHost) -> None:
    (host.bin / "trtllm-build").unlink()
    done = _build(kit, host)
    assert (done.returncode, done.stderr) == (4, "error: trtllm-build is not installed here\n")


def test_nothing_is_overwritten(kit: Path, host: GpuHost) -> None:
    (kit / "engine").mkdir()
    done = _build(kit, host)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert _build(kit, host, "cloud", str(kit / "other")).returncode == 2


def test_in_a_container(kit: Path, host: GpuHost, tmp_path: Path) -> None:
    host.program("docker", DOCKER)
    done = _build(kit, host, "container", str(tmp_path / "engines" / "llama"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "engines" / "llama" / "rank1.engine").is_file()
    said = (host.bin / "docker.txt").read_text()
    assert "--gpus all --shm-size 1g --ulimit memlock=-1" in said
    assert f"--volume {kit}:{kit} --volume {tmp_path}/engines:{tmp_path}/engines" in said


def test_under_slurm(kit: Path, host: GpuHost) -> None:
    host.program("srun", SRUN)
    host.program("sbatch", SBATCH)
    done = _build(kit, host, "slurm")
    assert done.returncode == 0, done.stderr
    assert (kit / "engine" / "rank1.engine").is_file()
    assert (host.bin / "srun.txt").read_text().startswith("--mpi=pmix --ntasks=2 trtllm-build")
    assert "--workers" not in host.calls()[0]
    script = (kit / "build.slurm").read_text()
    assert "#SBATCH --ntasks=2\n#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n" in script
