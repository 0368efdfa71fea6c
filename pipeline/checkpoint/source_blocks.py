"""A weight of the Hugging Face checkpoint as [out, in], a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.layout import SourceTensor
from pipeline.checkpoint.reader import BLOCK_BYTES
from pipeline.checkpoint.tensor_reader import TensorReader

Array = npt.NDArray[Any]

_TRANSPOSED_BLOCK_BYTES = 64 << 20
"""Every block of a transposed weight takes a pass over the whole tensor: better few than small."""


def source_blocks(
    reader: TensorReader,
    source: SourceTensor,
    block_bytes: int | None = None,
    within: range | None = None,
) -> Iterator[tuple[int, Array]]:
    """(first row, rows) of the weight, each block at most `block_bytes`, or one row if that is more.

    Rows count within the weight. The dtype is that of the file, float32 where something is added.

    Args:
        within: only these rows of the weight are read; None: all.
    """
    if block_bytes is None:
        block_bytes = _TRANSPOSED_BLOCK_BYTES if source.transposed else BLOCK_BYTES
    wanted = range(source.dims[0].size) if within is None else within
    for start, rows in _stored_blocks(reader, source, block_bytes, wanted):
        yield start, rows.astype(np.float32) + np.float32(source.offset) if source.offset else rows


def _stored_blocks(
    reader: TensorReader, source: SourceTensor, block_bytes: int, wanted: range
) -> Iterator[tuple[int, Array]]:
    if source.runs is None and not source.transposed:
        yield from reader.row_blocks(source.name, block_bytes, wanted)
        return
    tensor = reader.tensors[source.name]
    stored_rows = tensor.shape[-1] if source.transposed else tensor.shape[0]
    step = max(block_bytes // max(tensor.nbytes // max(stored_rows, 1), 1), 1)
    read = reader.read_columns if source.transposed else reader.read_rows
    first_row = 0  # of the weight, where a run begins
    for start, stop in _ranges(source, stored_rows):
        shift = start - first_row
        last = min(stop, wanted.stop + shift)
        for low in range(max(start, wanted.start + shift), last, step):
            yield low - shift, read(source.name, low, min(low + step, last))
        first_row += stop - start


def _ranges(source: SourceTensor, stored_rows: int) -> Iterator[tuple[int, int]]:
    """The stored rows of the weight, in the order in which they are its rows."""
    runs = source.runs
    if runs is None:
        yield 0, stored_rows
        return
    for group in range(runs.count):
        start = group * runs.stride + runs.start
        yield start, start + runs.rows
