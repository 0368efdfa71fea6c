"""Quantizing layer by layer against ModelOpt's own whole-model quantize and export, in one run.

Same checkpoint, same tokens, each contestant in a process of its own: wall time with imports and
export, peak memory, and what the exported checkpoint predicts on held-out tokens beside the original,
measured one layer at a time from the exported bytes. float16 matrices are multiplied in float32 by
all of them. Everything that is made is removed.

    python benchmarks/quantize.py --size demo
    python benchmarks/quantize.py --size 7b --layers 8 --samples 16 --seq-len 512 --dir /data
    python benchmarks/quantize.py --size 13b --samples 4 --seq-len 256 --no-whole --no-evaluate

Memory is the peak of the process, sampled every 50 ms: anonymous (RssAnon) and resident as a whole.
The demo is calibrated and evaluated on its own texts; synthetic weights on random tokens, so their
perplexity says nothing and their KL only how far the logits moved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from convert import SIZES, llama_config, watched_memory

from pipeline.checkpoint.layout import planned_bytes
from pipeline.checkpoint.synthetic import write_synthetic
from pipeline.demo import CALIBRATION_PATH, HELDOUT_PATH, MODEL_DIR
from pipeline.models import shape_from_hf
from pipeline.parallel import mappings
from pipeline.progress import SilentProgress
from pipeline.quant.data import TokenWindows, load_texts, token_windows
from pipeline.quant.formats import FORMATS
from pipeline.quant.preflight import QuantizeOptions
from pipeline.quant.source import SourceTokenizer, load_model, open_original, open_plain_checkpoint

WHOLE = "ModelOpt, whole model"
CUSTOM = ("hidden", "ffn", "heads", "kv-heads", "layers", "vocab")


@dataclass(frozen=True)
class Contestant:
    """One way to quantize."""

    search: str
    inputs: str

    @property
    def label(self) -> str:
        return f"layer by layer, {self.search}, {self.inputs} inputs"


class StderrProgress(SilentProgress):
    """Notes of every layer, so that a long run can be watched."""

    def advance(self, note: str = "") -> None:
        print(f"  {note}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["demo", "custom", *SIZES], default="demo")
    for name, default in zip(CUSTOM, (512, 1408, 8, 4, None, 4096), strict=True):
        text = "decoder layers, fewer than the size has" if name == "layers" else "for custom"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--format", default="int4_awq")
    parser.add_argument("--algorithm", default=None)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--search", nargs="+", choices=["gram", "modelopt"], default=["gram"])
    inputs = ["original", "quantized"]
    parser.add_argument("--inputs", nargs="+", choices=inputs, default=["original"])
    parser.add_argument("--heldout", type=int, default=8, help="windows to evaluate on")
    parser.add_argument("--max-memory-gb", type=float, default=None)
    parser.add_argument("--no-whole", action="store_true", help="only layer by layer")
    parser.add_argument("--no-evaluate", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    way = (options.format, options.algorithm or "awq")
    if not options.no_whole and way != ("int4_awq", "awq"):
        parser.error(f"ModelOpt's whole model is int4_awq by awq, not {way}: add --no-whole")
    return options


def make_source(options: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """The checkpoint to quantize, and what it is."""
    if options.size == "demo":
        return MODEL_DIR, "demo"
    custom = (options.hidden, options.ffn, options.heads, options.kv_heads, 4, options.vocab)
    hidden, ffn, heads, kv_heads, layers, vocab = SIZES.get(options.size, custom)
    layers = options.layers or layers
    config = llama_config(hidden, ffn, heads, kv_heads, layers, vocab)
    size = planned_bytes(shape_from_hf(config), FORMATS["fp16"], next(iter(mappings(1, 1))))
    free = shutil.disk_usage(folder).free
    needed = size + size // 2 + (2 << 30)
    print(f"needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free", flush=True)
    if needed > free:
        sys.exit("not enough room: choose a smaller --size, fewer --layers, or another --dir")
    source = folder / "source"
    source.mkdir()
    write_synthetic(config, source, seed=0, progress=SilentProgress())
    return source, f"{options.size}, {layers} layers, {size / 1e9:.2f} GB"


def windows(source: Path, options: argparse.Namespace, *, heldout: bool) -> TokenWindows:
    """Calibration or held-out tokens, the same for every contestant."""
    count = options.heldout if heldout else options.samples
    if options.size == "demo":
        return token_windows(
            load_texts(HELDOUT_PATH if heldout else CALIBRATION_PATH),
            SourceTokenizer(source),
            num_windows=count,
            seq_len=options.seq_len,
            seed=0,
            what="text of the demo",
        )
    vocab = open_plain_checkpoint(source).shape.vocab_size
    tokens_WT = np.random.default_rng(int(heldout)).integers(0, vocab, (count, options.seq_len))
    return TokenWindows(tokens_WT.astype(np.int64), count, tokens_WT.size)


def quantize_layers(source: Path, out_dir: Path, options: argparse.Namespace) -> None:
    """Child: layer by layer."""
    from pipeline.quant.quantizer import quantize_windows

    contestant = Contestant(**options.contestant)
    memory = options.max_memory_gb
    quantize = QuantizeOptions(
        options.format,
        options.group_size,
        options.samples,
        options.seq_len,
        options.batch_size,
        algorithm=options.algorithm,
        search=contestant.search,  # type: ignore[arg-type]
        inputs=contestant.inputs,  # type: ignore[arg-type]
        max_memory_bytes=int(memory * 1e9) if memory else None,
    )
    checkpoint = open_plain_checkpoint(source)
    calibration = windows(source, options, heldout=False)
    quantize_windows(checkpoint, out_dir, quantize, calibration, StderrProgress())


def quantize_whole(source: Path, out_dir: Path, options: argparse.Namespace) -> None:
    """Child: ModelOpt's own INT4 AWQ on the whole model, and its export."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    from pipeline.quant.float32_products import float32_products

    model = load_model(source, torch.float16)
    config: Any = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if block_sizes := (entry.get("cfg") or {}).get("block_sizes"):
            block_sizes[-1] = options.group_size
    calibration = windows(source, options, heldout=False)

    def forward_loop(quantizing: Any) -> None:
        for tokens_BT in calibration.batches(options.batch_size):
            with torch.no_grad():
                quantizing(torch.from_numpy(tokens_BT.copy()), use_cache=False, logits_to_keep=1)

    with float32_products(), torch.no_grad():
        mtq.quantize(model, config, forward_loop)
        export_hf_checkpoint(model, export_dir=out_dir)


def evaluate(source: Path, out_dir: Path, options: argparse.Namespace) -> None:
    """Child: what the exported bytes predict; the result is written beside them."""
    from pipeline.quant.layers.evaluate import compare_checkpoints

    heldout = windows(source, options, heldout=True)
    original, exported = open_original(source), open_original(out_dir)
    work_dir = Path(options.work_dir)
    found = compare_checkpoints(original, exported, heldout, work_dir, batch_size=4)
    (work_dir / "comparison.json").write_text(json.dumps(asdict(found)))


CHILDREN = {"layers": quantize_layers, "whole": quantize_whole, "evaluate": evaluate}


def run_child(
    what: str, source: Path, out_dir: Path, options: argparse.Namespace, **extra: Any
) -> tuple[float, int, int]:
    """Seconds, peak anonymous and peak resident bytes of one process; ends if it fails."""
    settings = {**vars(options), **extra}
    del settings["dir"]
    command = [sys.executable, __file__, "--child", what, str(source), str(out_dir)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, json.dumps(settings)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        with watched_memory(process.pid) as peaks:
            code = process.wait()
    finally:
        process.kill()  # when this program is ended first
    seconds = time.perf_counter() - started
    if code:
        sys.exit(f"{what} ended with code {code}")
    anonymous = max(peak[0] for peak in peaks.by_process.values())
    resident = max(peak[1] for peak in peaks.by_process.values())
    return seconds, anonymous, resident


def child(what: str, source: str, out_dir: str, settings: str) -> None:
    """What `run_child` starts."""
    CHILDREN[what](Path(source), Path(out_dir), argparse.Namespace(**json.loads(settings)))


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    contestants = [Contestant(s, i) for s in options.search for i in options.inputs]
    with tempfile.TemporaryDirectory(prefix="quantize-benchmark-", dir=options.dir) as name:
        folder = Path(name)
        source, what = make_source(options, folder)
        for heldout in (False, True):
            windows(source, options, heldout=heldout)  # too little text is noticed now
        rows = [measure("layers", c.label, source, folder, options, c) for c in contestants]
        if not options.no_whole:
            rows.append(measure("whole", WHOLE, source, folder, options, None))
    report(what, rows, options)


@dataclass(frozen=True)
class Row:
    """What one contestant took, and what came of it."""

    label: str
    seconds: float
    anonymous: int
    resident: int
    comparison: dict[str, float]


def measure(
    what: str,
    label: str,
    source: Path,
    folder: Path,
    options: argparse.Namespace,
    contestant: Contestant | None,
) -> Row:
    print(f"{label} ...", flush=True)
    out_dir = folder / "out"
    out_dir.mkdir()
    extra = {"contestant": asdict(contestant)} if contestant else {}
    seconds, anonymous, resident = run_child(what, source, out_dir, options, **extra)
    print(f"{label}: {seconds:.0f} s, {anonymous / 1e9:.2f} GB anonymous", flush=True)
    comparison: dict[str, float] = {}
    if not options.no_evaluate:
        run_child("evaluate", source, out_dir, options, work_dir=str(folder))
        comparison = json.loads((folder / "comparison.json").read_text())
    shutil.rmtree(out_dir)
    return Row(label, seconds, anonymous, resident, comparison)


def report(what: str, rows: list[Row], options: argparse.Namespace) -> None:
    """The page that is published."""
    print(
        f"\n{what}; {options.format}, groups of {options.group_size}, {options.samples} x "
        f"{options.seq_len} tokens in batches of {options.batch_size}"
    )
    peer = next((row for row in rows if row.label == WHOLE), None)
    print(
        f"{'':<42} {'s':>8} {'faster':>7} {'anon GB':>8} {'of peer':>8} {'res GB':>7} "
        f"{'perplexity':>11} {'mean KL':>9}"
    )
    for row in rows:
        faster = f"{peer.seconds / row.seconds:.2f}x" if peer else ""
        share = f"{row.anonymous / peer.anonymous:.2f}" if peer else ""
        found = row.comparison
        quality = f"{found['perplexity']:11.4f} {found['mean_kl']:9.5f}" if found else ""
        print(
            f"{row.label:<42} {row.seconds:8.1f} {faster:>7} {row.anonymous / 1e9:8.2f} "
            f"{share:>8} {row.resident / 1e9:7.2f} {quality}"
        )
    originals = [row.comparison["original_perplexity"] for row in rows if row.comparison]
    if originals:
        print(f"{'original':<42} {'':>42} {originals[0]:11.4f}")
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"load average of the last 1, 5, 15 minutes: {loads}, on {os.cpu_count()} cores")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
