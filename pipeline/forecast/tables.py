"""A forecast for people: what each stage takes, what fills each GPU, and what would fit instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.table import Table

from pipeline.forecast.changes import Change
from pipeline.forecast.device import RankMemory
from pipeline.forecast.from_config import Forecast
from pipeline.forecast.sizes_text import exact_text, size_text
from pipeline.forecast.weights import plain_bytes
from pipeline.quant.backends import ONNXRUNTIME

_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}


def rank_table(found: Forecast) -> Table:
    """Memory of the target, one line for ranks that are alike."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("weights", "KV cache", "activations", "runtime", "left"):
        table.add_column(name, justify="right")
    table.add_column("")
    for label, rank in alike(found.ranks):
        table.add_row(
            label,
            exact_text(rank.weights.total),
            exact_text(rank.kv_cache),
            f"~{size_text(rank.activations)}",
            f"~{size_text(rank.overhead)}",
            f"~{size_text(rank.left)}",
            f"[{_COLOURS[rank.verdict]}]{rank.verdict}[/]",
        )
    return table


def alike(ranks: Sequence[RankMemory]) -> Iterator[tuple[str, RankMemory]]:
    """("ranks 0-3", the first of them): neighbours with the same numbers."""

    def numbers(rank: RankMemory) -> tuple[object, ...]:
        return rank.weights, rank.kv_cache, rank.activations, rank.overhead

    for _, group in groupby(ranks, key=numbers):
        members = list(group)
        first, last = members[0], members[-1]
        label = f"rank {first.rank}" if first is last else f"ranks {first.rank}-{last.rank}"
        yield label, first


def change_table(changes: Sequence[Change]) -> Table:
    """Builds that would be possible, nearest first."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("possible instead", overflow="fold")
    table.add_column("GPUs", justify="right")
    for name in ("weights", "KV cache", "left"):
        table.add_column(name, justify="right")
    for change in changes:
        rank = change.fullest
        table.add_row(
            change.what,
            str(change.num_gpus),
            exact_text(rank.weights.total),
            exact_text(rank.kv_cache),
            f"~{size_text(rank.left)}",
        )
    return table


def size_lines(found: Forecast) -> list[str]:
    """What stands above the memory table."""
    target, limits, rank = found.subject.target, found.subject.limits, found.fullest
    precision = "exact" if found.exact else "by the budget"
    each = ", ".join(dict.fromkeys(map(exact_text, found.rank_bytes)))
    original = exact_text(found.source_bytes or plain_bytes(found.subject.shape))
    if found.source_bytes is None:
        original = f"about {original}, not fetched yet"
    is_cpu = found.subject.backend == ONNXRUNTIME
    where = "the CPU engine; the same on a" if is_cpu else "each rank on one"
    return [
        f"original {original}; TensorRT-LLM checkpoint {each} a rank ({precision})",
        f"KV cache {exact_text(rank.kv_bytes_per_token)} a token and rank, batch "
        f"{limits.max_batch_size} x {limits.max_seq_len} tokens, {found.kv_cache}",
        f"{where} {target.name}, {exact_text(target.memory_bytes)}:",
    ]
