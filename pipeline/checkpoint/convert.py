"""Hugging Face checkpoint to TensorRT-LLM checkpoint, a block of rows at a time.

Every block of a source is read once, cast once, and its part written to each rank of the stage. The
parts of fused sources land at consecutive rows, so nothing is ever assembled in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.cast import Caster
from pipeline.checkpoint.check import check_checkpoint, tied_pairs
from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.layout import (
    SourceTensor,
    TargetTensor,
    layer_targets,
    mapping_problems,
    planned_tensors,
    scope_targets,
)
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source import HfCheckpoint, open_checkpoint
from pipeline.checkpoint.trtllm_config import CONFIG_FILE, trtllm_config, write_trtllm_config
from pipeline.checkpoint.writer import SafetensorsWriter
from pipeline.errors import CheckpointError, PlanError, Problem
from pipeline.models import Scope
from pipeline.parallel import Mapping, Part, layers_of_stage, mappings, part
from pipeline.progress import Progress

__all__ = ["check_checkpoint", "convert_checkpoint", "rank_path"]

Array = npt.NDArray[Any]


def rank_path(checkpoint_dir: Path, rank: int) -> Path:
    """File of one rank in a TensorRT-LLM checkpoint."""
    return checkpoint_dir / f"rank{rank}.safetensors"


def convert_checkpoint(
    source_dir: Path, out_dir: Path, *, tp: int, pp: int, progress: Progress
) -> None:
    """Writes config.json and rank{0..tp*pp-1}.safetensors into `out_dir`, which must exist.

    Floats become float16; packed int4 and its scales are cut and joined as they are. Where the source
    folded a pre-quant scale into the norm before it, ones are written in its place. Holds some
    tens of megabytes, whatever the size of the model.

    Raises:
        CheckpointError: everything that is missing, unused, or of the wrong shape or dtype (before
            anything is written); or every tensor with values that float16 cannot hold.
        PlanError: the model cannot be cut this way; names the legal choices.
        StageError: not enough room on the disk.
    """
    checkpoint = open_checkpoint(source_dir)
    problems = check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format)
    if problems:
        raise CheckpointError(problems)
    illegal = mapping_problems(checkpoint.shape, checkpoint.format, tp, pp)
    if illegal:
        raise PlanError(illegal)
    _check_tied(checkpoint)
    caster = Caster()
    progress.start(checkpoint.shape.num_layers, "layers")
    for pp_rank in range(pp):
        ranks = [mapping for mapping in mappings(tp, pp) if mapping.pp_rank == pp_rank]
        _convert_stage(checkpoint, out_dir, ranks, caster, progress)
    if caster.problems:
        raise CheckpointError(caster.problems)
    config = trtllm_config(checkpoint.shape, checkpoint.format, tp=tp, pp=pp)
    write_trtllm_config(out_dir / CONFIG_FILE, config)


def _convert_stage(
    checkpoint: HfCheckpoint,
    out_dir: Path,
    ranks: Sequence[Mapping],
    caster: Caster,
    progress: Progress,
) -> None:
    shape, fmt = checkpoint.shape, checkpoint.format
    pp, pp_rank = ranks[0].pp, ranks[0].pp_rank
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SafetensorsWriter(
                    rank_path(out_dir, mapping.rank), planned_tensors(shape, fmt, mapping)
                )
            )
            for mapping in ranks
        ]
        stage = _StageWriter(checkpoint.reader, list(zip(ranks, writers, strict=True)), caster)
        if pp_rank == 0:
            stage.write_all(scope_targets(shape, fmt, Scope.FIRST))
        for local_layer, layer in enumerate(layers_of_stage(shape.num_layers, pp, pp_rank)):
            stage.write_all(layer_targets(shape, fmt, layer, local_layer))
            progress.advance(f"layer {layer}")
        if pp_rank == pp - 1:
            stage.write_all(scope_targets(shape, fmt, Scope.LAST))


class _StageWriter:
    """Writes targets to all tensor-parallel ranks of one pipeline stage."""

    def __init__(
        self,
        reader: CheckpointReader,
        ranks: Sequence[tuple[Mapping, SafetensorsWriter]],
        caster: Caster,
    ) -> None:
        self._reader = reader
        self._ranks = ranks
        self._caster = caster

    def write_all(self, targets: Iterable[TargetTensor]) -> None:
        for target in targets:
            if all(source.name not in self._reader.tensors for source in target.sources):
                self._fill(target)
            elif target.joined:
                self._join(target)
            else:
                self._write_same(target)

    def _join(self, target: TargetTensor) -> None:
        first_rows = [0] * len(self._ranks)
        for source in target.sources:
            for start, block in self._reader.row_blocks(source.name):
                values = self._caster.cast(source.name, block, target.dtype)
                for (mapping, writer), first_row in zip(self._ranks, first_rows, strict=True):
                    _write_block(writer, target, first_row, source, start, values, mapping)
            for index, (mapping, writer) in enumerate(self._ranks):
                rows = part(source.dims[0], mapping)
                _write_padding(writer, target, first_rows[index], rows, mapping)
                first_rows[index] += rows.size

    def _write_same(self, target: TargetTensor) -> None:
        """For a scale of the input channels: fused linears share their input, hence the scale."""
        first, *others = (
            self._caster.cast(source.name, self._reader.read(source.name), target.dtype)
            for source in target.sources
        )
        different = [
            source.name
            for source, other in zip(target.sources[1:], others, strict=True)
            if other.tobytes() != first.tobytes()
        ]
        if different:
            what = f"differs from {target.sources[0].name}, but both scale the same input"
            raise CheckpointError(Problem(name, what) for name in different)
        for mapping, writer in self._ranks:
            cut = tuple(_slice(part(dim, mapping)) for dim in target.sources[0].dims)
            writer.write(target.name, first[cut])

    def _fill(self, target: TargetTensor) -> None:
        assert target.fill is not None, f"{target.name}: check_checkpoint let a gap through"
        for mapping, writer in self._ranks:
            shape = target.spec(mapping).shape
            writer.write(target.name, np.full(shape, target.fill, NUMPY_DTYPES[target.dtype]))


def _write_block(
    writer: SafetensorsWriter,
    target: TargetTensor,
    first_row: int,
    source: SourceTensor,
    start: int,
    values: Array,
    mapping: Mapping,
) -> None:
    """Writes the overlap of rows [start, start + len(values)) of a source with a rank's part."""
    rows, *columns = (part(dim, mapping) for dim in source.dims)
    low, high = max(start, rows.start), min(start + len(values), rows.stop)
    if low < high:
        cut = (slice(low - start, high - start), *(_slice(column) for column in columns))
        writer.write_rows(target.name, first_row + low - rows.start, values[cut])


def _write_padding(
    writer: SafetensorsWriter,
    target: TargetTensor,
    first_row: int,
    rows: Part,
    mapping: Mapping,
) -> None:
    if rows.padding:
        shape = (rows.padding, *target.spec(mapping).shape[1:])
        zeros = np.zeros(shape, NUMPY_DTYPES[target.dtype])
        writer.write_rows(target.name, first_row + rows.stop - rows.start, zeros)


def _slice(cut: Part) -> slice:
    assert not cut.padding, "only rows are padded"
    return slice(cut.start, cut.stop)


def _check_tied(checkpoint: HfCheckpoint) -> None:
    """A tied model may carry a copy of the embedding as lm_head; anything else is a contradiction."""
    reader = checkpoint.reader
    for name, tied_to in tied_pairs(checkpoint.shape):
        if name not in reader.tensors:
            continue
        ours, theirs = reader.row_blocks(name), reader.row_blocks(tied_to)
        same = reader.tensors[name].shape == reader.tensors[tied_to].shape and all(
            a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(ours, theirs, strict=True)
        )
        if not same:
            what = f"differs from {tied_to}, but config.json ties the embeddings"
            fix = "set tie_word_embeddings to false, or remove the tensor"
            raise CheckpointError(Problem(name, what, fix=fix))
