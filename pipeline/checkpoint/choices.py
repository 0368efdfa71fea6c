"""The nearest legal choices when a feed-forward network cannot be cut as asked."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.checkpoint.padding import padded_shape
from pipeline.models import ModelShape
from pipeline.quant.formats import GROUP_SIZES, QuantFormat

Reasons = Callable[[ModelShape, QuantFormat, int], list[str]]
"""Why a shape in a format cannot be cut for so many tensor-parallel ranks; empty: it can."""


def nearest_choices(shape: ModelShape, fmt: QuantFormat, tp: int, reasons: Reasons) -> str:
    """What to write into the YAML instead, nearest first; empty if only another tp would help."""
    choices = []
    padded = padded_shape(shape, fmt, tp)
    if not reasons(padded, fmt, tp):
        more = padded.padded_intermediate_size - shape.intermediate_size
        choices.append(
            f"mapping.pad_ffn: true ({shape.intermediate_size} + {more} zeros, "
            f"{more / shape.intermediate_size:.1%} more; the model computes the same)"
        )
    choices += [
        f"quantize.group_size: {size}"
        for size in GROUP_SIZES
        if fmt.group_size not in (None, size) and not reasons(shape, fmt.with_group_size(size), tp)
    ]
    if not choices:
        return ""
    fewer = [n for n in range(2, tp) if tp % n == 0 and not reasons(shape, fmt, n)]
    if fewer:
        choices.append(f"tp: {max(fewer)} with pp: {tp // max(fewer)}")
    return " or ".join(choices)
