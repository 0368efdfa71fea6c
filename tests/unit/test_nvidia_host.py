"""The NVIDIA driver, GPUs and runtimes of a machine, and what an engine lacks there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.identity import DriverNeed, Identity, MappingIdentity, RankIdentity
from pipeline.integrity import offered_here
from pipeline.nvidia_host import Gpu, NvidiaHost, nvidia_host

VERSION = "1.7.1.116"
RTX = {"tensorrt_rtx_cu13_libs": VERSION}


def identity(world_size: int) -> Identity:
    """Of an engine for SM86 and SM89."""
    return Identity(
        kind="engine",
        backend="tensorrt_rtx",
        compiler="tensorrt_rtx",
        version=VERSION,
        sms=(86, 89),
        driver=DriverNeed(minimum="580", source="https://example.invalid"),
        mapping=MappingIdentity(tp=world_size, pp=1, moe_ep=1, world_size=world_size),
        limits=None,
        checkpoint_key="a" * 64,
        format="fp16",
        tools={},
        ranks=tuple(
            RankIdentity(
                rank=rank,
                files=(f"rank{rank}.engine", f"rank{rank}.onnx"),
                weight_bytes=64,
                weights_sha256="b" * 64,
            )
            for rank in range(world_size)
        ),
    )


def test_a_machine_that_can() -> None:
    host = NvidiaHost("580.65.06", (Gpu("RTX 4090", 89), Gpu("RTX 3090", 86)))
    here = offered_here(identity(2), host, RTX)
    assert here.can_run
    assert here.lines == ()


@pytest.mark.parametrize(
    ("host", "installed", "expected"),
    [
        (
            NvidiaHost(None, ()),
            RTX,
            ["no NVIDIA driver here: the engine cannot run on this machine"],
        ),
        (
            NvidiaHost("570.133.20", (Gpu("RTX 4090", 89),) * 2),
            RTX,
            [
                "the NVIDIA driver here is 570.133.20: the engine needs 580 or newer "
                "(https://example.invalid)"
            ],
        ),
        (
            NvidiaHost("580.65.06", (Gpu("H200", 90), Gpu("RTX 4090", 89))),
            RTX,
            [
                "GPUs here: H200 (SM90), RTX 4090 (SM89); the engine needs 2 GPUs, one a rank, of SM86, "
                "SM89: run it there, or build it with another `target`"
            ],
        ),
        (
            NvidiaHost("580.65.06", (Gpu("RTX 4090", 89),) * 2),
            {"tensorrt_rtx_cu13_libs": "1.6.1.120"},
            [
                f"TensorRT-RTX 1.6.1.120 is installed here: the engine runs with {VERSION} only; "
                "install that, or build the engine again"
            ],
        ),
        (
            NvidiaHost("580.65.06", (), "nvidia-smi gave no answer within 10 s"),
            {},
            [
                "nvidia-smi gave no answer within 10 s",
                f"TensorRT-RTX is not installed here: the engine needs TensorRT-RTX {VERSION}",
            ],
        ),
    ],
    ids=["no driver", "old driver", "other GPU", "other version", "nothing known"],
)
def test_a_machine_that_cannot(
    host: NvidiaHost, installed: dict[str, str], expected: list[str]
) -> None:
    here = offered_here(identity(2), host, installed)
    assert not here.can_run
    assert list(here.lines) == expected


def test_a_machine_without_a_driver_still_runs_the_cpu_network() -> None:
    here = offered_here(identity(1), NvidiaHost(None, ()), RTX)
    assert here.lines == (
        "no NVIDIA driver here: the engine cannot run on this machine; the CPU network can",
    )


PROC = """NVRM version: NVIDIA UNIX {kind}  580.65.06  {built}
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2)
"""


@pytest.fixture
def proc(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "version"
    path.write_text(PROC.format(kind="x86_64 Kernel Module", built="Sun Jul 27 07:15:05 UTC 2025"))
    return path


def _smi(tmp_path: Path, script: str) -> str:
    """A stand-in for nvidia-smi, which no machine without a GPU has."""
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_driver_and_gpus_of_a_machine(proc: Path, tmp_path: Path) -> None:
    rows = "NVIDIA GeForce RTX 4090, 8.9, 580.65.06\\nNVIDIA H200, 9.0, 580.65.06\\n"
    smi = _smi(tmp_path, f"printf '{rows}'")
    gpus = (Gpu("NVIDIA GeForce RTX 4090", 89), Gpu("NVIDIA H200", 90))
    assert nvidia_host(proc, smi) == NvidiaHost("580.65.06", gpus)
    assert nvidia_host(tmp_path / "none", smi) == NvidiaHost("580.65.06", gpus)  # as under WSL
    proc.write_text(PROC.format(kind="Open Kernel Module for x86_64", built="Release Build"))
    assert nvidia_host(proc, str(tmp_path / "none")) == NvidiaHost(
        "580.65.06", (), "nvidia-smi is not on PATH, so the GPUs are not known"
    )


def test_a_machine_without_driver_and_one_that_fails(proc: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "none"
    assert nvidia_host(nothing, str(nothing)) == NvidiaHost(None, ())
    failing = _smi(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert nvidia_host(nothing, failing) == NvidiaHost(None, ())
    said = NvidiaHost("580.65.06", (), "nvidia-smi says: NVIDIA-SMI has failed")
    assert nvidia_host(proc, failing) == said
