"""The Hugging Face tensors back from rank files: the inverse of convert, for round-trip tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from pipeline.checkpoint.layout import SourceTensor, TargetTensor, stage_targets
from pipeline.models import ModelShape
from pipeline.parallel import Mapping, mappings, part, unshard
from pipeline.quant.formats import FORMATS

Array = np.ndarray[Any, Any]
Ranks = list[tuple[Mapping, dict[str, Array]]]


def restore(
    checkpoint_dir: Path, shape: ModelShape, *, tp: int, pp: int, moe_ep: int = 1
) -> dict[str, Array]:
    """Every source of a float16 checkpoint by its Hugging Face name, in its stored layout.

    Sources with an offset keep it (they are float16, and the sum was rounded).
    """
    restored: dict[str, Array] = {}
    read: set[str] = set()
    ranks: Ranks = [
        (mapping, load_file(checkpoint_dir / f"rank{mapping.rank}.safetensors"))
        for mapping in mappings(tp, pp, moe_ep)
    ]
    for pp_rank in range(pp):
        stage = [(mapping, tensors) for mapping, tensors in ranks if mapping.pp_rank == pp_rank]
        for target in stage_targets(shape, FORMATS["fp16"], pp, pp_rank):
            read.add(f"{pp_rank} {target.name}")
            for source in target.sources:
                weight = _weight(target, source, stage)
                _place(restored, source, weight)
    held = {f"{mapping.pp_rank} {name}" for mapping, tensors in ranks for name in tensors}
    assert held == read
    return restored


def _weight(target: TargetTensor, source: SourceTensor, stage: Ranks) -> Array:
    """The whole [out, in] weight from the parts of all ranks that hold one."""
    shards = []
    for mapping, tensors in stage:
        first_row = 0
        rows = tensors[target.name]
        if target.num_experts:
            rows = rows.reshape(-1, *rows.shape[2:])
        for held in target.held_sources(mapping):
            count = part(held.dims[0], mapping).size
            if held == source:
                shards.append(rows[first_row : first_row + count])
            first_row += count
        assert first_row == len(rows)
    return unshard(shards, source.dims)


def _place(restored: dict[str, Array], source: SourceTensor, weight: Array) -> None:
    whole = restored.setdefault(source.name, np.full(source.shape, np.nan, weight.dtype))
    stored = whole.T if source.transposed else whole
    if source.runs is None:
        stored[...] = weight
        return
    runs = source.runs
    grouped = stored.reshape(runs.count, runs.stride, *stored.shape[1:])
    rows = grouped[:, runs.start : runs.start + runs.rows]
    if np.shares_memory(rows, whole):
        rows[...] = weight.reshape(rows.shape)
    else:  # a transposed view cannot be regrouped in place
        assert runs.count == 1
        stored[runs.start : runs.start + runs.rows] = weight
