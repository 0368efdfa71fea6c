"""The nearest builds that fit where the asked one does not, weighed by the functions that refused it.

How far a change goes is counted in doublings: twice the GPUs, half the batch or half the bits of a
weight are one each. Another target counts its memory the same way, and one more: it has to be bought.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from pipeline.checkpoint.padding import padded_shape
from pipeline.forecast.device import RankMemory, fits, fullest, rank_memories
from pipeline.forecast.sizes_text import exact_text
from pipeline.forecast.subject import Subject, cut_problems, is_possible
from pipeline.quant.formats import FORMATS, GROUP_SIZES
from pipeline.quant.preflight import formats_from_plain
from pipeline.targets import TARGETS

MAX_CHANGES: Final = 6
_PARALLEL_SIZES: Final = (2, 4, 8, 16, 32, 64)
_SEQ_STEP: Final = 64
"""Lengths are rounded down to a multiple of it."""
_BITS: Final = {"fp16": 16, "int8_wo": 8, "int8_sq": 8, "fp8": 8, "w4a8_awq": 4, "int4_awq": 4}
"""Of a weight. Other formats are not offered: they need a source that has them, or a budget."""


@dataclass(frozen=True)
class Change:
    """One way to make it fit.

    Attributes:
        what: lines of the YAML: "mapping.tp: 2".
        distance: in doublings.
        subject: the build that it makes.
        fullest: its fullest rank.
    """

    what: str
    distance: float
    subject: Subject
    fullest: RankMemory

    @property
    def num_gpus(self) -> int:
        """How many the changed build runs on."""
        return self.subject.world_size


def change_text(change: Change) -> str:
    """What becomes of the fullest rank: "weights 3.60 GB, KV cache 2.15 GB, 18.9 GB left"."""
    rank = change.fullest
    gpus = f"{change.num_gpus} GPUs, " if change.num_gpus > 1 else ""
    return (
        f"{gpus}weights {exact_text(rank.weights.total)}, KV cache {exact_text(rank.kv_cache)}, "
        f"{exact_text(rank.left)} left"
    )


def nearest_changes(subject: Subject, *, formats: bool = True) -> tuple[Change, ...]:
    """At most MAX_CHANGES builds that can be cut, built and held, nearest first.

    Args:
        formats: whether another format may be chosen: not for weights that are quantized already.
    """
    found: list[Change] = []
    for what, distance, changed in _candidates(subject, formats=formats):
        if is_possible(changed) and fits(changed):
            most = fullest(rank_memories(changed))
            found.append(Change(what, distance, changed, most))
    return tuple(sorted(found, key=lambda change: change.distance)[:MAX_CHANGES])


def _candidates(subject: Subject, *, formats: bool) -> Iterator[tuple[str, float, Subject]]:
    if cut_problems(subject):
        yield from _cut_otherwise(subject, formats=formats)
        return
    if formats and subject.budget_bits is None and subject.format.group_size is not None:
        yield from _group_sizes(subject)
    yield from _smaller_batch(subject)
    yield from _shorter(subject)
    yield from _more_ranks(subject)
    if formats and subject.budget_bits is None:
        yield from _formats(subject)
    yield from _targets(subject)


def _cut_otherwise(subject: Subject, *, formats: bool) -> Iterator[tuple[str, float, Subject]]:
    """Of a shape that cannot be cut as asked."""
    shape = padded_shape(subject.shape, subject.cut_format, subject.tp)
    if shape is not subject.shape:
        more = shape.padded_intermediate_size / subject.shape.intermediate_size
        yield "mapping.pad_ffn: true", math.log2(more), replace(subject, shape=shape)
    if formats and subject.format.group_size is not None:
        yield from _group_sizes(subject)
    world = subject.world_size
    for tp in range(1, 2 * subject.tp + 1):
        for pp in {max(1, world // tp), subject.pp}:
            if tp == subject.tp and pp == subject.pp:
                continue
            distance = abs(math.log2(tp / subject.tp)) + abs(math.log2(pp / subject.pp))
            changed = replace(subject, tp=tp, pp=pp)
            if subject.moe_ep <= tp and tp % subject.moe_ep == 0:
                yield _mapping_text(subject, changed), distance, changed


def _group_sizes(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    for size in GROUP_SIZES:
        if size != subject.format.group_size:
            changed = replace(subject, format=subject.format.with_group_size(size))
            yield f"quantize.group_size: {size}", 0.1, changed


def _smaller_batch(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    limits = subject.limits

    def with_batch(batch: int) -> Subject:
        return replace(subject, limits=replace(limits, max_batch_size=batch))

    most = _largest(1, limits.max_batch_size - 1, lambda batch: fits(with_batch(batch)))
    if most is not None:
        distance = math.log2(limits.max_batch_size / most)
        yield f"build.max_batch_size: {most}", distance, with_batch(most)


def _shorter(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    """Half of a shorter sequence, at most, may be a prompt."""
    limits = subject.limits

    def with_steps(steps: int) -> Subject:
        length = steps * _SEQ_STEP
        tokens = min(limits.max_input_len, length // 2)
        shorter = replace(limits, max_seq_len=length, max_input_len=tokens)
        return replace(subject, limits=shorter)

    steps = (limits.max_seq_len - 1) // _SEQ_STEP
    most = _largest(1, steps, lambda count: fits(with_steps(count)))
    if most is None:
        return
    changed = with_steps(most)
    text = f"build.max_seq_len: {changed.limits.max_seq_len}"
    if changed.limits.max_input_len != limits.max_input_len:
        text += f", max_input_len: {changed.limits.max_input_len}"
    yield text, math.log2(limits.max_seq_len / changed.limits.max_seq_len), changed


def _more_ranks(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    """The fewest further ranks of either kind, and of both."""
    for name in ("tp", "pp"):
        now = getattr(subject, name)
        for size in _PARALLEL_SIZES:
            if size <= now or size % now:
                continue
            changed = _with_size(subject, name, size)
            if is_possible(changed) and fits(changed):
                yield _mapping_text(subject, changed), math.log2(size / now), changed
                break
    both = replace(subject, tp=2 * subject.tp, pp=2 * subject.pp)
    yield _mapping_text(subject, both), 2.0, both


def _with_size(subject: Subject, name: str, size: int) -> Subject:
    return replace(subject, tp=size) if name == "tp" else replace(subject, pp=size)


def _mapping_text(subject: Subject, changed: Subject) -> str:
    names = [
        f"{name}: {getattr(changed, name)}"
        for name in ("tp", "pp")
        if getattr(changed, name) != getattr(subject, name)
    ]
    return f"mapping.{', '.join(names)}"


def _formats(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    now = _BITS.get(subject.format.name)
    if now is None or subject.format.exceptions:
        return
    for name in formats_from_plain(subject.shape.architecture):
        bits = _BITS.get(name, now)
        if bits < now:
            fmt = FORMATS[name].with_kv_cache(subject.format.kv_cache)
            if fmt.group_size is not None:
                fmt = fmt.with_group_size(subject.group_size)
            changed = replace(subject, format=fmt)
            yield f"quantize.format: {name}", math.log2(now / bits), changed


def _targets(subject: Subject) -> Iterator[tuple[str, float, Subject]]:
    """The smallest GPU that holds it."""
    now = subject.target
    larger = [t for t in TARGETS.values() if t.memory_bytes > now.memory_bytes]
    for target in sorted(larger, key=lambda one: (one.memory_bytes, one.name)):
        changed = replace(subject, target=target)
        if is_possible(changed) and fits(changed):
            distance = 1 + math.log2(target.memory_bytes / now.memory_bytes)
            yield f"target: {target.name}", distance, changed
            return


def _largest(low: int, high: int, is_good: Callable[[int], bool]) -> int | None:
    """The largest number from low to high that is good, where all below a good one are good."""
    if high < low or not is_good(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if is_good(middle):
            low = middle
        else:
            high = middle - 1
    return low
