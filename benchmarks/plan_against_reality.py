"""What a plan says, and what the build then takes: weights, KV cache, memory and disk, build by build.

Each case is planned, run to the end in a directory of its own, and measured while it runs: anonymous
memory (RssAnon) of the stage's processes together, sampled every 20 ms; bytes of every artifact; the
weights that the compiler wrote; the sizes of the network's cache inputs. The limit is the plan: 1 is a
prediction that was met. Synthetic weights, but for the demo.

    python benchmarks/plan_against_reality.py
    python benchmarks/plan_against_reality.py --case demo 7b-2 --dir /data
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from convert import SIZES, children, llama_config, read_if_alive

from pipeline.config import load_config
from pipeline.forecast.machine import this_machine
from pipeline.plan import Plan, Step, make_plan
from pipeline.progress import Progress, SilentProgress
from pipeline.run import RunResult, run
from pipeline.workspace import Workspace

_SAMPLE_S = 0.02
_SMALL = 5e6
"""Reports and configs; what a plan says of them is a round number."""


def _llama(name: str, layers: int) -> dict[str, Any]:
    hidden, ffn, heads, kv, _, vocab = SIZES[name]
    return llama_config(hidden, ffn, heads, kv, layers, vocab)


def _case(shape: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """The YAML of a build; keys of `changes` are section__key."""
    model = {"source": "demo"} if shape is None else {"source": "synthetic", "shape": shape}
    data: dict[str, Any] = {
        "model": model,
        "target": "rtx4090",
        "build": {"max_batch_size": 4, "max_input_len": 512, "max_seq_len": 1024},
        "verify": {"num_windows": 2, "seq_len": 128},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data.setdefault(section, {})[name] = value
    return data


CASES: dict[str, dict[str, Any]] = {
    "demo": _case(None),
    "demo-fp16-cpu": _case(None, quantize__format="fp16", build__backend="onnxruntime"),
    "wide-8": _case(llama_config(1024, 4096, 16, 4, 8, 32000), quantize__group_size=64),
    "wide-8-cpu": _case(llama_config(1024, 4096, 16, 4, 8, 32000), build__backend="onnxruntime"),
    "7b-2": _case(_llama("7b", 2), build__max_seq_len=2048, build__max_input_len=1024),
    "7b-4": _case(_llama("7b", 4), build__max_seq_len=2048, build__max_input_len=1024),
    "7b-2-long": _case(
        _llama("7b", 2),
        rehearsal__num_samples=16,
        rehearsal__seq_len=256,
        build__max_seq_len=4096,
        build__max_batch_size=1,
    ),
    "13b-2": _case(_llama("13b", 2)),
    "demo-tp2": _case(None, quantize__format="fp16", mapping__tp=2),
    "demo-pp2": _case(None, quantize__format="fp16", mapping__pp=2),
    "wide-8-tp2": _case(llama_config(1024, 4096, 16, 4, 8, 32000), mapping__tp=2),
}
USUAL = ("demo", "demo-tp2", "demo-pp2", "wide-8", "wide-8-cpu", "wide-8-tp2", "7b-2", "7b-4")


@dataclass
class Watcher:
    """A RunView that notes what each stage takes.

    Attributes:
        anonymous: stage -> peak bytes of its processes at one time.
        seconds: stage -> wall time.
    """

    anonymous: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = ""

    def stage_hit(self, step: Step) -> None:
        pass

    def stage_starts(self, step: Step) -> Progress:
        self.stage = step.stage.name
        return SilentProgress()

    def stage_done(self, step: Step, seconds: float, facts: dict[str, Any]) -> None:
        self.seconds[self.stage] = seconds
        self.stage = ""

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def note(self, anonymous: int) -> None:
        if self.stage:
            self.anonymous[self.stage] = max(self.anonymous.get(self.stage, 0), anonymous)


@contextmanager
def sampled(watcher: Watcher) -> Iterator[None]:
    """Samples what runs below this process until the block is left."""
    own, ended = os.getpid(), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            watcher.note(sum(anonymous_bytes(one) for one in children(own) if one != own))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def anonymous_bytes(process: int) -> int:
    for line in read_if_alive(Path(f"/proc/{process}/status")).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def cache_bytes(path: Path) -> int:
    """Of the float16 network's cache inputs, for one row."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    total = 0
    for value in graph.input:
        if value.name.startswith("past_"):
            total += 2 * product(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    return total


def new_bytes(directory: Path, counted: set[int]) -> int:
    """Bytes of its files that no directory before it shares; links lead elsewhere."""
    total = 0
    for path in directory.rglob("*"):
        status = path.lstat()
        if not path.is_symlink() and status.st_ino not in counted:
            counted.add(status.st_ino)
            total += status.st_blocks * 512
    return total


def product(numbers: Iterator[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def line(what: str, planned: float, real: float, unit: float = 1e6) -> None:
    ratio = f"{real / planned:7.3f}" if planned else ""
    print(f"  {what:<34} {planned / unit:>12.2f} {real / unit:>12.2f} {ratio}", flush=True)


def measure(name: str, data: dict[str, Any], folder: Path) -> None:
    """Plan and run one case; prints what was said beside what came."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    loaded, workspace = load_config(path), Workspace(folder / name)
    plan = make_plan(loaded, workspace.store, workspace.digests(), machine=this_machine(folder))
    watcher = Watcher()
    started = time.monotonic()
    with sampled(watcher):
        result = run(loaded, workspace, watcher)
    print(f"\n{name}: {time.monotonic() - started:.0f} s; MB, and real / planned")
    report(plan, result, watcher)


def report(plan: Plan, result: RunResult, watcher: Watcher) -> None:
    """One block of the page that is published."""
    assert plan.forecast is not None
    print(f"  {'':<34} {'planned':>12} {'real':>12} {'ratio':>7}")
    limits = plan.forecast.subject.limits
    build = result.artifacts["build"]
    for rank, facts in zip(plan.forecast.ranks, build.facts["ranks"], strict=True):
        if facts["backend"] == "tensorrt_rtx":
            line(f"rank {rank.rank} weights on the GPU", rank.weights.total, facts["weight_bytes"])
        cache = cache_bytes(build.path / f"rank{rank.rank}.trt.onnx") * limits.max_batch_size
        line(f"rank {rank.rank} KV cache on the GPU", rank.kv_cache, cache)
        if facts["activation_bytes"] is not None:
            line(f"rank {rank.rank} activations", rank.activations, facts["activation_bytes"])
    stages = {} if plan.host is None else {one.stage: one for one in plan.host.stages}
    for stage, anonymous in watcher.anonymous.items():
        line(f"{stage}: memory of the host", stages[stage].ram_peak, anonymous)
    counted: set[int] = set()
    for stage, artifact in result.artifacts.items():
        written = new_bytes(artifact.path, counted)
        if max(written, stages[stage].disk_written) > _SMALL:
            line(f"{stage}: disk", stages[stage].disk_written, written)
    for stage, seconds in watcher.seconds.items():
        band = stages[stage].seconds
        print(f"  {stage + ': seconds':<34} {band[0]:>6.0f}-{band[1]:<5.0f} {seconds:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(USUAL))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    for name in options.case:
        with tempfile.TemporaryDirectory(prefix="plan-benchmark-", dir=options.dir) as folder:
            measure(name, CASES[name], Path(folder))
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"load average of the last 1, 5, 15 minutes: {loads}, on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
