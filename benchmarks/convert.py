"""How fast convert is, and how much memory it takes, against `cp` of the same bytes in the same run.

Makes a synthetic float16 checkpoint of a true Llama shape, then lets `cp` and convert take turns: source
to a new directory on the same disk, until the data is on the disk (fsync). Before each turn the source
is dropped from the page cache, so both read the disk. Every output is removed before the next turn: the
disk must hold the weights twice. The limit is cp; the ratio is convert's rate to cp's, turn by turn.

    python benchmarks/convert.py --size 13b --tp 2 --pp 2 --launch sequential mpirun --dir /data

Memory is the peak of each process, sampled every 50 ms: anonymous (RssAnon) and resident as a whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.convert_processes import convert_in_processes
from pipeline.checkpoint.layout import planned_bytes
from pipeline.checkpoint.synthetic import write_synthetic
from pipeline.models import shape_from_hf
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from pipeline.quant.formats import FORMATS

# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, num_hidden_layers, vocab
SIZES = {
    "1b": (2048, 5632, 32, 4, 22, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 8, 32, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 64, 8, 80, 32000),
}
_SAMPLE_S = 0.05


@dataclass
class Peaks:
    """Peak bytes of each process by its id: (anonymous, resident)."""

    by_process: dict[int, tuple[int, int]] = field(default_factory=dict)

    def note(self, process: int, anonymous: int, resident: int) -> None:
        old = self.by_process.get(process, (0, 0))
        self.by_process[process] = (max(old[0], anonymous), max(old[1], resident))


def llama_config(hidden: int, ffn: int, heads: int, kv: int, layers: int, vocab: int) -> Any:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def sync(directory: Path) -> None:
    """Wait until every file of a directory is on the disk, then drop it from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def children(root: int) -> list[int]:
    """Process ids of `root` and everything below it."""
    found = [root]
    for process in found:
        for thread in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, read_if_alive(thread).split())
    return found


def read_if_alive(path: Path) -> str:
    """A file of /proc; empty when the process has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


@contextmanager
def watched_memory(root: int) -> Iterator[Peaks]:
    """Samples the Python processes below `root`, itself included, until the block is left."""
    peaks, ended = Peaks(), threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            for process in children(root):
                text = read_if_alive(Path(f"/proc/{process}/status"))
                fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
                if "RssAnon" in fields:
                    sizes = (int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
                    peaks.note(process, *sizes)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def timed(source: Path, out_dir: Path, work: Callable[[], None]) -> tuple[float, float]:
    """Seconds until `work` returns, and until its output is on the disk. The output is removed."""
    sync(source)
    out_dir.mkdir()
    try:
        started = time.perf_counter()
        work()
        returned = time.perf_counter() - started
        sync(out_dir)
        return returned, time.perf_counter() - started
    finally:
        shutil.rmtree(out_dir)


def run_convert(source: Path, out_dir: Path, options: argparse.Namespace, launch: str) -> Peaks:
    """Convert in a process of its own, as a stage does; returns its memory."""
    arguments = [str(source), str(out_dir), str(options.tp), str(options.pp), launch]
    command = [sys.executable, __file__, "--child", *arguments]
    process = subprocess.Popen(command)
    with watched_memory(process.pid) as peaks:
        code = process.wait()
    if code:
        sys.exit(f"convert ended with code {code}")
    return peaks


def child(source: str, out_dir: str, tp: str, pp: str, launch: str) -> None:
    """What `run_convert` starts."""
    options: dict[str, Any] = {"tp": int(tp), "pp": int(pp), "progress": SilentProgress()}
    if launch == "one":
        convert_checkpoint(Path(source), Path(out_dir), **options)
    else:
        convert_in_processes(Path(source), Path(out_dir), launch=launch, **options)


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rate(size: int, seconds: list[float]) -> str:
    return spread([size / value / 1e6 for value in seconds], 0)


def make_source(config: Any, source: Path) -> float:
    """Seconds to make the synthetic checkpoint, until it is on the disk."""
    source.mkdir()
    started = time.perf_counter()
    write_synthetic(config, source, seed=0, progress=SilentProgress())
    sync(source)
    return time.perf_counter() - started


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "custom"], default="1b")
    names = ("hidden", "ffn", "heads", "kv-heads", "layers", "vocab")
    for name, default in zip(names, SIZES["1b"], strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, help="for --size custom")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    launches = ("one", "sequential", "mpirun")
    text = "one process for all, several with ranks of their own, or those under MPI"
    parser.add_argument("--launch", choices=launches, nargs="+", default=["one"], help=text)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    return parser.parse_args()


def main() -> None:
    options = parsed()
    custom = (options.hidden, options.ffn, options.heads, options.kv_heads)
    numbers = SIZES.get(options.size, (*custom, options.layers, options.vocab))
    config = llama_config(*numbers)
    shape = shape_from_hf(config)
    size = sum(
        planned_bytes(shape, FORMATS["fp16"], mapping)
        for mapping in mappings(options.tp, options.pp)
    )
    free = shutil.disk_usage(options.dir).free
    print(f"needs {2 * size / 1e9:.1f} GB of disk for source and output, {free / 1e9:.1f} are free")
    if 2 * size + (1 << 30) > free:
        sys.exit("not enough room: choose a smaller --size, or another --dir")
    with tempfile.TemporaryDirectory(prefix="convert-benchmark-", dir=options.dir) as folder:
        compare(config, size, Path(folder), options)


@dataclass
class Turns:
    """What one contestant took, turn by turn.

    Attributes:
        returned: seconds until it ended.
        stored: seconds until its output was on the disk.
    """

    returned: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    memory: list[Peaks] = field(default_factory=list)


def compare(config: Any, size: int, folder: Path, options: argparse.Namespace) -> None:
    source, out_dir = folder / "source", folder / "out"
    making = make_source(config, source)
    print(f"made the source in {making:.0f} s", flush=True)
    files = [str(path) for path in sorted(source.iterdir())]
    turns = {name: Turns() for name in ("cp", *options.launch)}
    for _ in range(options.rounds):
        for name, turn in turns.items():

            def work(name: str = name, turn: Turns = turn) -> None:
                if name == "cp":
                    subprocess.run(["cp", "--reflink=never", *files, str(out_dir)], check=True)
                else:
                    turn.memory.append(run_convert(source, out_dir, options, name))

            returned, stored = timed(source, out_dir, work)
            turn.returned.append(returned)
            turn.stored.append(stored)
            print(f"{name:<10} {returned:7.1f} s, on disk {stored:7.1f} s", flush=True)
    report(size, making, turns, options)


def report(size: int, making: float, turns: dict[str, Turns], options: argparse.Namespace) -> None:
    """The page that is published."""
    print(
        f"\n{options.size}, {size / 1e9:.2f} GB, tp {options.tp} x pp {options.pp}; MB/s and ratio, "
        f"median (least to greatest) of {options.rounds}"
    )
    print(f"{'':<20} {'until it returns':>20} {'/ cp':>20} {'until on disk':>20} {'/ cp':>20}")
    cp = turns["cp"]
    for name, turn in turns.items():
        label = name if name == "cp" else f"convert, {name}"
        cells = [
            text
            for ours, theirs in ((turn.returned, cp.returned), (turn.stored, cp.stored))
            for text in (rate(size, ours), ratio(theirs, ours))
        ]
        print(f"{label:<20} " + " ".join(f"{cell:>20}" for cell in cells))
    print(
        f"synthetic writer: {size / making / 1e6:.0f} MB/s on disk, once; "
        f"/ cp {ratio(cp.stored, [making] * options.rounds)}"
    )
    peaks = [p for turn in turns.values() for m in turn.memory for p in m.by_process.values()]
    anonymous, resident = (max(peak[i] for peak in peaks) / 2**20 for i in (0, 1))
    print(
        f"convert, peak of any process: {anonymous:.0f} MiB anonymous, {resident:.0f} MiB resident"
    )
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"load average of the last 1, 5, 15 minutes: {loads}, on {os.cpu_count()} cores")


def ratio(theirs: list[float], ours: list[float]) -> str:
    return spread([a / b for a, b in zip(theirs, ours, strict=True)], 2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
