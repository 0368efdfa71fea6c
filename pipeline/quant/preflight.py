"""Everything that can stop a quantization, found from headers alone, before anything is loaded.

ModelOpt notices most of this after calibrating, at export. Nothing heavy is imported here, so `plan`
may call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.checkpoint.reader import TensorInfo
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.errors import CheckpointError, PlanError, Problem
from pipeline.models import ARCHITECTURES, ModelShape
from pipeline.quant.formats import FORMATS, GROUP_SIZES
from pipeline.quant.source import missing_tokenizer, open_plain_checkpoint

QUANTIZERS = {"int4_awq": "awq_lite"}
"""Formats that this package can make, and ModelOpt's algorithm for each."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        format: a name of FORMATS that QUANTIZERS has.
        group_size: input features that share one scale, 64 or 128.
        num_samples: calibration windows.
        seq_len: tokens of one window.
        batch_size: windows per forward pass. ModelOpt weighs batches equally, so a smaller last batch
            weighs a little more per token.
        seed: chooses the windows.
        num_threads: threads of one matrix product; None keeps torch's number. Other numbers may
            change last bits of activations and with them, rarely, a scale.
        device: where to compute; "cuda" was written but never run.
    """

    format: str
    group_size: int
    num_samples: int
    seq_len: int
    batch_size: int
    seed: int = 0
    num_threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"


def formats_from_plain(architecture: str) -> tuple[str, ...]:
    """Formats that plain weights of an architecture can have in an engine: fp16, and what we make."""
    formats = ARCHITECTURES[architecture].formats
    return tuple(name for name in formats if name == "fp16" or name in QUANTIZERS)


def linears_to_quantize(shape: ModelShape) -> tuple[str, ...]:
    """Hugging Face names without ".weight" of every linear that becomes int4, layer by layer.

    Those of every expert, too. Embeddings and lm_head are outside the decoder layers and stay as
    they are.
    """
    rules = [rule for rule in ARCHITECTURES[shape.architecture].rules if rule.quantized]
    names = (
        source.name.format(layer=layer, expert=expert)
        for layer in range(shape.num_layers)
        for rule in rules
        for expert in range(shape.num_experts if rule.experts else 1)
        for source in rule.sources
    )
    return tuple(dict.fromkeys(names))  # fused sources share a linear


def check_source(source_dir: Path, options: QuantizeOptions) -> HfCheckpoint:
    """The opened checkpoint, if quantizing it with these options can succeed.

    Raises:
        CheckpointError: see `open_plain_checkpoint`; also mixed dtypes, or no tokenizer.
        PlanError: the options cannot be used, or not for this model; every offending linear listed.
    """
    checkpoint = open_plain_checkpoint(source_dir)
    linears = _linears(checkpoint)
    problems = list(dtype_problems(checkpoint))
    tokenizer_problem = missing_tokenizer(source_dir)
    if tokenizer_problem:
        problems.append(tokenizer_problem)
    if problems:
        raise CheckpointError(problems)

    problems = list(_option_problems(options, checkpoint.shape))
    problems.extend(_size_problems(linears, options.group_size))
    if problems:
        raise PlanError(problems)
    return checkpoint


def _linears(checkpoint: HfCheckpoint) -> dict[str, TensorInfo]:
    names = linears_to_quantize(checkpoint.shape)
    return {name: checkpoint.reader.tensors[f"{name}.weight"] for name in names}


def _option_problems(options: QuantizeOptions, shape: ModelShape) -> Iterator[Problem]:
    if options.format not in QUANTIZERS:
        known = "cannot be made here" if options.format in FORMATS else "is unknown"
        known = "needs no quantizer" if options.format == "fp16" else known
        yield Problem(
            "quantize.format", f"{options.format!r} {known}", allowed=", ".join(QUANTIZERS)
        )
    elif options.format not in ARCHITECTURES[shape.architecture].formats:
        yield Problem(
            "quantize.format",
            f"{shape.architecture} cannot be quantized to {options.format} yet",
            allowed=", ".join(formats_from_plain(shape.architecture)),
        )
    if options.group_size not in GROUP_SIZES:
        yield Problem(
            "quantize.group_size",
            f"{options.group_size} is no group size of int4 kernels",
            allowed=", ".join(map(str, GROUP_SIZES)),
        )
    for field in ("num_samples", "seq_len", "batch_size"):
        value = getattr(options, field)
        if value < 1:
            yield Problem(f"quantize.calibration.{field}", f"is {value}", allowed="1 or more")
    if options.seq_len > shape.max_position_embeddings:
        yield Problem(
            "quantize.calibration.seq_len",
            f"{options.seq_len} is longer than the model's {shape.max_position_embeddings} "
            "positions",
            allowed=f"at most {shape.max_position_embeddings}",
        )


def dtype_problems(checkpoint: HfCheckpoint) -> Iterator[Problem]:
    """Linears of a dtype that cannot be quantized, or of several dtypes."""
    linears, source_dir = _linears(checkpoint), checkpoint.directory
    dtypes = sorted({info.dtype for info in linears.values()})
    if len(dtypes) > 1:
        yield Problem(
            str(source_dir),
            f"the decoder layers mix {' and '.join(dtypes)}",
            allowed="one dtype",
            fix="save the checkpoint in one dtype",
        )


def _size_problems(linears: dict[str, TensorInfo], group_size: int) -> Iterator[Problem]:
    for name, info in linears.items():
        num_outputs, num_inputs = info.shape
        if group_size > 0 and num_inputs % group_size:
            fits = [str(size) for size in GROUP_SIZES if num_inputs % size == 0]
            yield Problem(
                f"{name}.weight",
                f"{num_inputs} input features are not a multiple of group_size {group_size}",
                allowed=f"group_size {' or '.join(fits)}" if fits else "",
                fix="" if fits else "quantize this model in another format",
            )
        if num_outputs % 2:
            yield Problem(
                f"{name}.weight",
                f"{num_outputs} output features cannot be packed in pairs",
                fix="quantize this model in another format",
            )
