"""The NVIDIA driver and GPUs of this machine, without any library of NVIDIA's."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")
_KERNEL_MODULE = re.compile(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s")
_QUERY = ("--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
_TIMEOUT_S = 10


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and compute capability times ten."""

    name: str
    sm: int


@dataclass(frozen=True)
class NvidiaHost:
    """What there is.

    Attributes:
        driver: its version; None without one.
        gpus: those that nvidia-smi lists.
        failure: why a driver is there but no GPU could be listed; "" if none.
    """

    driver: str | None
    gpus: tuple[Gpu, ...]
    failure: str = ""


def nvidia_host(driver_file: Path = DRIVER_FILE, smi: str | None = None) -> NvidiaHost:
    """Look at this machine; a fraction of a second where there is no driver.

    Args:
        driver_file: where the kernel module tells its version.
        smi: the program to ask; None: nvidia-smi of PATH.
    """
    try:
        found = _KERNEL_MODULE.search(driver_file.read_text("utf-8", errors="replace"))
    except OSError:  # no driver, or a system (WSL) where only nvidia-smi knows it
        found = None
    driver = found[1] if found else None
    program = shutil.which("nvidia-smi" if smi is None else smi)
    if program is None:
        failure = "nvidia-smi is not on PATH, so the GPUs are not known" if driver else ""
        return NvidiaHost(driver, (), failure)
    try:
        done = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return NvidiaHost(driver, (), f"nvidia-smi gave no answer within {_TIMEOUT_S} s")
    except OSError as error:
        return NvidiaHost(driver, (), f"nvidia-smi does not start: {error.strerror}")
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    gpus = [_gpu(row) for row in rows if len(row) == 3]
    if done.returncode or None in gpus or len(gpus) != len(rows):
        said = (done.stdout or done.stderr).strip().partition("\n")[0]
        # Without a driver nvidia-smi fails too; then there is nothing to explain.
        return NvidiaHost(driver, (), f"nvidia-smi says: {said}" if driver else "")
    return NvidiaHost(driver or (rows[0][2] if rows else None), tuple(filter(None, gpus)))


def _gpu(row: list[str]) -> Gpu | None:
    name, capability, _ = row
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return None
    return Gpu(name, 10 * int(major) + int(minor))
