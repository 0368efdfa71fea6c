"""Hugging Face checkpoint to TensorRT-LLM checkpoint, a block of rows at a time.

Every block of a source is cast once, and its part written to each rank of the stage. How much is read
at a time is the reader's and `source_blocks`' business: rows of 2 MB, more for a transposed weight (in
several passes), a whole linear of AutoAWQ or GPTQ. The parts of fused sources land at consecutive rows,
so nothing is ever assembled in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.cast import Caster
from pipeline.checkpoint.check import check_checkpoint, tied_pairs
from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.findings import Findings
from pipeline.checkpoint.held import Held, held
from pipeline.checkpoint.layout import (
    SourceTensor,
    TargetTensor,
    mapping_problems,
    planned_sizes,
    stage_targets,
)
from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.padding import padded_shape
from pipeline.checkpoint.shared_scales import code_ratios, largest_scale, rescaled
from pipeline.checkpoint.source import HfCheckpoint, open_checkpoint
from pipeline.checkpoint.source_blocks import source_blocks
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.checkpoint.trtllm_config import (
    CONFIG_FILE,
    QUANT_FILE,
    mixed_config,
    trtllm_config,
    write_trtllm_config,
)
from pipeline.checkpoint.writer import SafetensorsWriter, check_room
from pipeline.errors import CheckpointError, PlanError, Problem
from pipeline.parallel import Mapping, Part, mappings, part
from pipeline.progress import Progress

__all__ = ["check_checkpoint", "convert_checkpoint", "rank_path"]

DEFAULT = ConvertOptions()

Array = npt.NDArray[Any]


def rank_path(checkpoint_dir: Path, rank: int) -> Path:
    """File of one rank in a TensorRT-LLM checkpoint."""
    return checkpoint_dir / f"rank{rank}.safetensors"


def convert_checkpoint(
    source_dir: Path,
    out_dir: Path,
    *,
    tp: int,
    pp: int,
    moe_ep: int = 1,
    progress: Progress,
    options: ConvertOptions = DEFAULT,
) -> None:
    """Writes config.json and rank{0..tp*pp-1}.safetensors into `out_dir`, which must exist.

    Floats become float16; codes and their scales are cut and joined as they are, except FP8 codes of
    fused weights whose scales differ (`shared_scales`). Where the source folded a pre-quant scale into
    the norm before it, ones are written in its place. Holds a few blocks (see the module), whatever the
    size of the model.

    Raises:
        CheckpointError: everything that is missing, unused, or of the wrong shape or dtype (before
            anything is written); or every tensor with values that float16 cannot hold.
        PlanError: the model cannot be cut this way; names the legal choices.
        StageError: not enough room on the disk.
    """
    checkpoint = checked_source(source_dir, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, options=options)
    progress.start(num_targets(checkpoint, mappings(tp, pp, moe_ep)), "tensors")
    convert_checked(
        checkpoint, out_dir, tp=tp, pp=pp, moe_ep=moe_ep, progress=progress, options=options
    )


def convert_checked(
    checkpoint: HfCheckpoint,
    out_dir: Path,
    *,
    tp: int,
    pp: int,
    moe_ep: int,
    progress: Progress,
    options: ConvertOptions,
) -> None:
    """All stages of what `checked_source` returned, then config.json.

    Raises:
        CheckpointError: every tensor with values that float16 cannot hold.
    """
    findings = convert_ranks(checkpoint, out_dir, mappings(tp, pp, moe_ep), progress=progress)
    judge(findings, progress, options)
    write_config(checkpoint, out_dir, tp=tp, pp=pp, moe_ep=moe_ep)


def open_source(source_dir: Path, *, tp: int, options: ConvertOptions) -> HfCheckpoint:
    """The source as `options` ask for it to be converted; headers only. Raises CheckpointError."""
    checkpoint = open_checkpoint(source_dir, requantize=options.requantize_asymmetric)
    if not options.pad_ffn:
        return checkpoint
    return replace(checkpoint, shape=padded_shape(checkpoint.shape, checkpoint.format, tp))


def checked_source(
    source_dir: Path,
    out_dir: Path,
    *,
    tp: int,
    pp: int,
    moe_ep: int = 1,
    options: ConvertOptions = DEFAULT,
) -> HfCheckpoint:
    """The source, after everything that can be checked before a byte is written.

    Raises:
        CheckpointError, PlanError, StageError: as `convert_checkpoint`.
    """
    checkpoint = open_source(source_dir, tp=tp, options=options)
    problems = check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format)
    if problems:
        raise CheckpointError(problems)
    illegal = mapping_problems(checkpoint.shape, checkpoint.format, tp, pp, moe_ep)
    if illegal:
        raise PlanError(illegal)
    ranks = mappings(tp, pp, moe_ep)
    check_room(out_dir, sum(planned_sizes(checkpoint.shape, checkpoint.format, ranks)))
    _check_tied(checkpoint)
    return checkpoint


def num_targets(checkpoint: HfCheckpoint, ranks: Iterable[Mapping]) -> int:
    """How many times `convert_ranks` reports progress for these ranks."""
    stages = {(mapping.pp, mapping.pp_rank) for mapping in ranks}
    targets = (stage_targets(checkpoint.shape, checkpoint.format, *stage) for stage in stages)
    return sum(1 for stage in targets for _ in stage)


def convert_ranks(
    checkpoint: HfCheckpoint, out_dir: Path, ranks: Sequence[Mapping], *, progress: Progress
) -> Findings:
    """Writes the files of some ranks, which depend on no other rank.

    The bytes of a file do not depend on which ranks are converted together. Ranks of one stage read
    the source once if they are; apart, each reads the rows that it holds.

    Returns:
        What is said of the values for which these ranks answer (`held`).

    Raises:
        CheckpointError, StageError: as `convert_checkpoint`.
    """
    findings = Findings()
    for pp_rank in dict.fromkeys(mapping.pp_rank for mapping in ranks):
        stage = [mapping for mapping in ranks if mapping.pp_rank == pp_rank]
        _convert_stage(checkpoint, out_dir, stage, findings, progress)
    return findings


def judge(findings: Findings, progress: Progress, options: ConvertOptions) -> None:
    """Says what was done to values.

    Raises:
        CheckpointError: every tensor with values that float16 cannot hold: the files must not be used.
    """
    problems = findings.problems(options)
    if problems:
        raise CheckpointError(problems)
    for note in findings.notes():
        progress.say(note)


def write_config(
    checkpoint: HfCheckpoint, out_dir: Path, *, tp: int, pp: int, moe_ep: int = 1
) -> None:
    """Writes config.json, which makes rank files a checkpoint: the last step.

    Before it quant_cfg.json, where linears have different formats.
    """
    shape, fmt = checkpoint.shape, checkpoint.format
    if fmt.is_mixed:
        write_trtllm_config(out_dir / QUANT_FILE, mixed_config(shape, fmt, pp=pp))
    config = trtllm_config(shape, fmt, tp=tp, pp=pp, moe_ep=moe_ep)
    write_trtllm_config(out_dir / CONFIG_FILE, config)


def _convert_stage(
    checkpoint: HfCheckpoint,
    out_dir: Path,
    ranks: Sequence[Mapping],
    findings: Findings,
    progress: Progress,
) -> None:
    shape, fmt = checkpoint.shape, checkpoint.format
    targets = list(stage_targets(shape, fmt, ranks[0].pp, ranks[0].pp_rank))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SafetensorsWriter(
                    rank_path(out_dir, mapping.rank),
                    [target.spec(mapping) for target in targets],
                )
            )
            for mapping in ranks
        ]
        stage = _StageWriter(checkpoint.reader, list(zip(ranks, writers, strict=True)), findings)
        for target in _in_file_order(targets, checkpoint.reader):
            stage.write(target)
            progress.advance(target.name)


def _in_file_order(targets: Iterable[TargetTensor], reader: TensorReader) -> list[TargetTensor]:
    """By the first of their sources in the files: files are read front to back.

    A fused target reads its other sources when its first one comes; they lie close by.
    """
    positions = {name: index for index, name in enumerate(reader.tensors)}
    last = len(positions)
    return sorted(
        targets,
        key=lambda target: min(positions.get(source.name, last) for source in target.sources),
    )


class _StageWriter:
    """Writes targets to some tensor-parallel ranks of one pipeline stage."""

    def __init__(
        self,
        reader: TensorReader,
        ranks: Sequence[tuple[Mapping, SafetensorsWriter]],
        findings: Findings,
    ) -> None:
        self._reader = reader
        self._ranks = ranks
        self._caster = Caster(findings)
        self._findings = findings
        first = ranks[0][0]
        self._stage = [
            mapping
            for mapping in mappings(first.tp, first.pp, first.moe_ep)
            if mapping.pp_rank == first.pp_rank
        ]

    def write(self, target: TargetTensor) -> None:
        if all(source.name not in self._reader.tensors for source in target.sources):
            self._fill(target)
        elif target.joined:
            self._join(target)
        else:
            self._write_one(target)

    def _join(self, target: TargetTensor) -> None:
        first_rows = [0] * len(self._ranks)
        own = [frozenset(target.held_sources(mapping)) for mapping, _ in self._ranks]
        ratios = code_ratios(self._reader, target)
        self._findings.rescaled |= ratios.keys()
        for source in target.sources:
            holders = [index for index, sources in enumerate(own) if source in sources]
            if holders:
                self._copy(target, source, ratios.get(source.name), holders, first_rows)

    def _copy(
        self,
        target: TargetTensor,
        source: SourceTensor,
        ratio: np.float32 | None,
        holders: Sequence[int],
        first_rows: list[int],
    ) -> None:
        """Writes one source to the ranks `holders`, and moves on where each of them writes."""
        share = self._held(target, source)
        lefts = [columns.start for columns in share.needed[1:]]
        cut = (slice(None), *(slice(c.start, c.stop) for c in share.needed[1:]))
        for start, block in source_blocks(self._reader, source, within=share.needed[0]):
            needed = block[cut]
            origin = (start, *lefts)
            values = self._caster.cast(
                source.name,
                needed,
                target.dtype,
                target=target.name,
                checked=share.checked_in(origin, needed.shape),
            )
            if ratio is not None:
                values = rescaled(values, ratio)
            for index in holders:
                mapping, writer = self._ranks[index]
                _write_block(writer, target, first_rows[index], source, origin, values, mapping)
        for index in holders:
            mapping, writer = self._ranks[index]
            _write_padding(writer, target, first_rows[index], source, mapping)
            first_rows[index] += part(source.dims[0], mapping).size

    def _write_one(self, target: TargetTensor) -> None:
        """For a scale of which the target has only one: the largest, or linears are fused if theirs
        are equal."""
        values = {group[0].name: self._read_one(target, group) for group in target.groups}
        if target.fill is not None and len({x.tobytes() for x in values.values()}) > 1:
            self._findings.unlike_experts.add(target.sources[0].name)
        for mapping, writer in self._ranks:
            parts = [part(dim, mapping) for dim in target.sources[0].dims]
            cut = tuple(_slice(one) for one in parts)
            own = [
                _padded(values[group[0].name][cut], parts, target.fill or 0)
                for group in target.held_groups(mapping)
            ]
            writer.write(target.name, np.stack(own).reshape(target.spec(mapping).shape))

    def _read_one(self, target: TargetTensor, sources: Sequence[SourceTensor]) -> Array:
        if target.at_least is not None:
            return largest_scale(self._reader, sources, target.at_least)
        first, *others = (self._whole(target, source) for source in sources)
        different = [
            source.name
            for source, other in zip(sources[1:], others, strict=True)
            if other.tobytes() != first.tobytes()
        ]
        if different:
            what = (
                f"differs from {sources[0].name}, but both become the one scale of a fused "
                f"linear ({target.name})"
            )
            raise CheckpointError(Problem(name, what) for name in different)
        return first

    def _whole(self, target: TargetTensor, source: SourceTensor) -> Array:
        values = self._reader.read(source.name)
        origin = (0,) * len(source.dims)
        checked = self._held(target, source).checked_in(origin, values.shape[: len(source.dims)])
        return self._caster.cast(
            source.name, values, target.dtype, target=target.name, checked=checked
        )

    def _held(self, target: TargetTensor, source: SourceTensor) -> Held:
        holders = [mapping for mapping in self._stage if source in target.held_sources(mapping)]
        own = [mapping for mapping, _ in self._ranks if mapping in holders]
        if not own:
            return Held((), None)
        return held(source.dims, holders, own)

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
    origin: Sequence[int],
    values: Array,
    mapping: Mapping,
) -> None:
    """Writes the overlap of a block of a source, which begins at `origin`, with a rank's part."""
    rows, *columns = (part(dim, mapping) for dim in source.dims)
    start, *lefts = origin
    low, high = max(start, rows.start), min(start + len(values), rows.stop)
    if low < high:
        cut = (
            slice(low - start, high - start),
            *(slice(c.start - left, c.stop - left) for c, left in zip(columns, lefts, strict=True)),
        )
        parts = [Part(0, high - low), *columns]
        padded = _padded(values[cut], parts, 0)
        writer.write_rows(target.name, first_row + low - rows.start, padded)


def _write_padding(
    writer: SafetensorsWriter,
    target: TargetTensor,
    first_row: int,
    source: SourceTensor,
    mapping: Mapping,
) -> None:
    rows, *columns = (part(dim, mapping) for dim in source.dims)
    if rows.padding:
        shape = (rows.padding, *(column.size for column in columns))
        zeros = np.zeros(shape, NUMPY_DTYPES[target.dtype])
        writer.write_rows(target.name, first_row + rows.stop - rows.start, zeros)


def _padded(values: Array, parts: Sequence[Part], fill: float) -> Array:
    """`values` with what each part has of padding behind it."""
    widths = [(0, one.padding) for one in parts]
    if not any(after for _, after in widths):
        return values
    return np.pad(values, widths, constant_values=fill)


def _slice(cut: Part) -> slice:
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
