"""How fast stages were seen to be: every rate with its source and machine, and the band made of it.

A band is the measured time, faster and slower by FASTER and SLOWER, fitted to the cores: nothing is
measured when planning, and other machines, disks and neighbours differ by such factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

FASTER: Final = 3.0
SLOWER: Final = 4.0
_MOST_CORES: Final = 16
"""More than that were never seen to help."""

Seconds = tuple[float, float]
"""From, to."""


@dataclass(frozen=True)
class Rate:
    """One measurement.

    Attributes:
        per_second: units in a second.
        unit: of what.
        bound: by what it is limited; more cores help where it is "cores".
        cores: of the machine it was seen on.
        source: where the number is from.
    """

    per_second: float
    unit: str
    bound: Literal["cores", "one core", "disk", "network"]
    cores: int
    source: str

    def band(self, amount: float, cores: int) -> Seconds:
        """Seconds for `amount` units with so many cores."""
        seconds = amount / self.per_second
        if self.bound == "cores":
            seconds *= self.cores / max(1, min(cores, _MOST_CORES))
        return seconds / FASTER, seconds * SLOWER


_BUSY = "2 cores of an AMD EPYC with other work beside it, 2026-11"

RATES: Final[dict[str, Rate]] = {
    "download": Rate(50e6, "bytes", "network", 2, "an assumption: 400 Mbit/s"),
    "synthesize": Rate(350e6, "bytes", "cores", 2, f"benchmarks/convert.py, {_BUSY}"),
    "quantize weights": Rate(
        5.6e6, "weights", "cores", 2, f"benchmarks/quantize.py, Llama-2-13B, 128 tokens; {_BUSY}"
    ),
    "multiply": Rate(
        60e9,
        "float32 operations",
        "cores",
        2,
        f"an estimate: torch products of 512 x 4096 x 4096 made 25e9 at a load of 6; {_BUSY}",
    ),
    "convert": Rate(597e6, "bytes", "disk", 2, f"benchmarks/convert.py, Llama-2-13B; {_BUSY}"),
    "export": Rate(200e6, "bytes", "one core", 2, f"the network of Llama-2-13B; {_BUSY}"),
    "compile": Rate(
        70e6, "bytes", "one core", 2, f"TensorRT-RTX 1.7.1, Llama-2-7B and 13B; {_BUSY}"
    ),
    "hash": Rate(400e6, "bytes", "one core", 2, f"sha256 of artifacts; {_BUSY}"),
    "start": Rate(0.15, "processes", "one core", 2, f"interpreter and libraries; {_BUSY}"),
}


def band(name: str, amount: float, cores: int) -> Seconds:
    """Seconds for `amount` units of a rate of RATES."""
    return RATES[name].band(amount, cores)


def added(*bands: Seconds) -> Seconds:
    """One after the other."""
    return sum(low for low, _ in bands), sum(high for _, high in bands)
