"""How long the search of AWQ scales takes, beside ModelOpt's own search of the same linears in one run.

Linears that read one tensor, as q, k and v do, with random weights and activations of which a few
channels are fifty times larger. Both searches take the same batches and take turns.

    python benchmarks/awq_search.py                                    a small one, under a minute
    python benchmarks/awq_search.py --inputs 4096 --outputs 4096 4096 4096 --tokens 8192 --batch 2048
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

import pipeline.quant.search.algorithm as gram


class SharedInput(nn.Module):
    """Linears that read the same tensor."""

    def __init__(self, num_inputs: int, outputs: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(num_inputs, size, bias=False, dtype=dtype) for size in outputs
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every linear of x."""
        return [linear(x) for linear in self.linears]


def activations(options: argparse.Namespace, dtype: torch.dtype) -> list[torch.Tensor]:
    """Batches [tokens, inputs]."""
    generator = torch.Generator().manual_seed(0)
    channels_K = torch.exp(0.5 * torch.randn(options.inputs, generator=generator))
    channels_K[torch.randperm(options.inputs, generator=generator)[: options.inputs // 100]] *= 50
    sizes = [options.batch] * (options.tokens // options.batch)
    return [
        (torch.randn(size, options.inputs, generator=generator) * channels_K).to(dtype)
        for size in sizes
    ]


def measure(model: nn.Module, algorithm: dict[str, Any], loop: Callable[[Any], None]) -> Any:
    """(seconds of calibration, the quantized model)."""
    quantized = copy.deepcopy(model)
    config = {**copy.deepcopy(mtq.INT4_AWQ_CFG), "algorithm": None}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(quantized, config)
        started = time.perf_counter()
        mtq.calibrate(quantized, algorithm, loop)
    return time.perf_counter() - started, quantized


def found(quantized: Any) -> list[tuple[float | None, float]]:
    """(alpha, mean squared error) of each linear."""
    facts = []
    for linear in quantized.linears:
        search = getattr(linear, "awq_lite", None)
        if search is None:
            ours = getattr(linear, gram.FACTS)
            facts.append((ours.alpha, ours.loss))
        else:
            best = search.best_alpha
            facts.append((float(best), float(search.loss[best]) / search.num_search_steps))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, nargs="+", default=[1024, 256, 256])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=512, help="tokens of one forward pass")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = SharedInput(options.inputs, options.outputs, dtype)
    batches = activations(options, dtype)

    def loop(module: Any) -> None:
        for x in batches:
            module(x)

    ways = {
        "ModelOpt awq_lite": {"method": "awq_lite", "debug": True},
        "gram, one by one": {"method": "awq_gram", "joint": False},
        "gram, joint": {"method": "awq_gram"},
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results = {}
    for _ in range(options.runs):
        for way, algorithm in ways.items():
            took, quantized = measure(model, algorithm, loop)
            seconds[way].append(took)
            results[way] = found(quantized)
            del quantized
    shape = f"{options.inputs} -> {'+'.join(map(str, options.outputs))}, {options.dtype}"
    print(f"{shape}, {options.tokens} tokens in batches of {options.batch}")
    print(f"{'search':<20} {'median s':>9} {'min':>8}   ModelOpt / it   alpha (error)")
    peer = seconds["ModelOpt awq_lite"]
    for way, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(values, peer, strict=True))
        facts = ", ".join(
            f"{'none' if alpha is None else format(alpha, '.2f')} ({loss:.4g})"
            for alpha, loss in results[way]
        )
        row = f"{way:<20} {statistics.median(values):>9.2f} {min(values):>8.2f}   {ratio:>13.1f}"
        print(f"{row}   {facts}")


if __name__ == "__main__":
    main()
