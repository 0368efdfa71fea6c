"""GPUs that engines are built for: compute capability, memory, bandwidth.

Memory and bandwidth are the vendor's data-sheet figures, of the SXM form where there are several; of
H200 (141 GB) and B200 (180 GB) the memory is what the driver shows of it. SM numbers as in NVIDIA's list
of GPUs by compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One GPU or module.

    Attributes:
        name: the word users write in the YAML.
        sm: compute capability times ten, e.g. 89.
        memory_bytes: device memory.
        bandwidth_bytes_s: peak memory bandwidth in bytes per second.
    """

    name: str
    sm: int
    memory_bytes: int
    bandwidth_bytes_s: float


def _gpu(name: str, sm: int, memory_gib: int, bandwidth_gb_s: int) -> Target:
    return Target(name, sm, memory_gib * 1024**3, bandwidth_gb_s * 1e9)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _gpu("a100-80gb", 80, 80, 2039),
        _gpu("a10", 86, 24, 600),
        _gpu("rtx3090", 86, 24, 936),
        _gpu("orin-agx-64gb", 87, 64, 204),
        _gpu("rtx4090", 89, 24, 1008),
        _gpu("l4", 89, 24, 300),
        _gpu("l40s", 89, 48, 864),
        _gpu("h100-80gb", 90, 80, 3350),
        _gpu("h200", 90, 139, 4800),
        _gpu("b200", 100, 179, 8000),
        _gpu("rtx5090", 120, 32, 1792),
    )
}
