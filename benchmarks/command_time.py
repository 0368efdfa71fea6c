"""How long `plan` and a run with nothing to do take, as whole commands.

The peer, measured in turn in the same run, is what such a command would take if it imported torch:
`python -c "import torch"`. The limit is a bare start of the interpreter. Build the config first.

    python benchmarks/command_time.py [--config configs/demo.yaml] [--runs 7]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def measure(commands: dict[str, list[str]], runs: int) -> dict[str, list[float]]:
    """Wall seconds of each command; the commands take turns, so drift of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if turn > 0:  # the first turn fills the file cache
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    pipeline = [sys.executable, "-m", "pipeline"]
    seconds = measure(
        {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import torch": [sys.executable, "-c", "import torch"],
            "plan": [*pipeline, "plan", options.config],
            "run, nothing to do": [*pipeline, "run", options.config],
        },
        options.runs,
    )
    peer = seconds["import torch"]
    print(f"{'command':<20} {'median s':>9} {'min':>7} {'max':>7}   / import torch (pair by pair)")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, peer, strict=True))
        print(
            f"{name:<20} {statistics.median(values):>9.3f} {min(values):>7.3f} {max(values):>7.3f}"
            f"   {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
