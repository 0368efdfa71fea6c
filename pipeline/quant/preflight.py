"""Everything that can stop a quantization, found from headers alone, before anything is loaded.

ModelOpt notices most of this after calibrating, at export. Nothing heavy is imported here, so `plan`
may call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.checkpoint.layout import planned_sources
from pipeline.checkpoint.reader import TensorInfo
from pipeline.checkpoint.source import HfCheckpoint
from pipeline.errors import CheckpointError, PlanError, Problem
from pipeline.models import ARCHITECTURES, ModelShape
from pipeline.models.linears import decoder_linears
from pipeline.quant.formats import FORMATS, GROUP_SIZES, MIXED
from pipeline.quant.recipe import ALGORITHMS
from pipeline.quant.source import missing_tokenizer, open_plain_checkpoint

MADE = (*ALGORITHMS, MIXED)
"""Formats that the quantize stage makes of plain weights."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        format: one of MADE.
        group_size: input features that share one scale, 64 or 128; of formats with groups.
        num_samples: calibration windows.
        seq_len: tokens of one window.
        batch_size: windows per forward pass. ModelOpt weighs batches equally, so a smaller last batch
            weighs a little more per token.
        seed: chooses the windows.
        num_threads: threads of one matrix product; None keeps torch's number. Other numbers may
            change last bits of activations and with them, rarely, a scale.
        device: where to compute; "cuda" was written but never run.
        algorithm: how weights are rounded; None: the usual one of the format.
        search: who searches AWQ's scales; see `pipeline.quant.recipe.LayerRecipe`.
        kv_cache: of which keys and values are to be scaled.
        inputs: a layer is calibrated on what the original layers before it compute, or on what the
            quantized ones do.
        keep: linears that stay as they are: their Hugging Face names, * stands for anything.
        max_memory_bytes: that hidden states may count on; None: what is free. Changes no result.
        budget_bits: with format "mixed", mean bits per weight of the decoder layers' linears.
        candidates: with format "mixed", what each group of linears may become.
        sensitivity: by what they are chosen; see `pipeline.quant.sensitivity.walk`.
        lm_head: how the head is stored; it changes nothing in the layers.
    """

    format: str
    group_size: int
    num_samples: int
    seq_len: int
    batch_size: int
    seed: int = 0
    num_threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    algorithm: str | None = None
    search: Literal["gram", "modelopt"] = "gram"
    kv_cache: Literal["fp16", "fp8", "int8"] = "fp16"
    inputs: Literal["original", "quantized"] = "original"
    keep: tuple[str, ...] = ()
    max_memory_bytes: int | None = None
    budget_bits: float | None = None
    candidates: tuple[str, ...] = ()
    sensitivity: Literal["layer", "output", "kl"] = "layer"
    lm_head: Literal["fp16", "int8_wo"] = "fp16"


def formats_from_plain(architecture: str) -> tuple[str, ...]:
    """Formats that plain weights of an architecture can have in an engine: fp16, and what we make."""
    formats = ARCHITECTURES[architecture].formats
    return tuple(name for name in formats if name == "fp16" or name in MADE)


def check_source(source_dir: Path, options: QuantizeOptions) -> HfCheckpoint:
    """The opened checkpoint, if quantizing it with these options can succeed.

    Raises:
        CheckpointError: see `open_plain_checkpoint`; also mixed dtypes, or no tokenizer.
        PlanError: the options cannot be used, or not for this model; every offending linear listed.
    """
    checkpoint = open_plain_checkpoint(source_dir)
    problems = list(dtype_problems(checkpoint))
    tokenizer_problem = missing_tokenizer(source_dir)
    if tokenizer_problem:
        problems.append(tokenizer_problem)
    if problems:
        raise CheckpointError(problems)

    problems = list(_option_problems(options, checkpoint.shape))
    if options.format in MADE:
        problems.extend(_size_problems(checkpoint.shape, options.format, options.group_size))
    if problems:
        raise PlanError(problems)
    return checkpoint


def _layer_tensors(checkpoint: HfCheckpoint) -> dict[str, TensorInfo]:
    """Every tensor of a decoder layer that the model reads."""
    prefix = decoder_linears(checkpoint.shape)[0].partition("0.")[0]
    stored = checkpoint.reader.tensors
    names = [source.name for source in planned_sources(checkpoint.shape, FORMATS["fp16"])]
    return {name: stored[name] for name in names if name.startswith(prefix) and name in stored}


def _option_problems(options: QuantizeOptions, shape: ModelShape) -> Iterator[Problem]:
    if options.format not in MADE:
        known = "cannot be made here" if options.format in FORMATS else "is unknown"
        known = "needs no quantizer" if options.format == "fp16" else known
        yield Problem("quantize.format", f"{options.format!r} {known}", allowed=", ".join(MADE))
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
    """Decoder layers of several dtypes, norms and biases included: a layer is run in one."""
    found: dict[str, str] = {}
    for name, info in _layer_tensors(checkpoint).items():
        found.setdefault(info.dtype, name)
    if len(found) > 1:
        examples = ", ".join(f"{dtype} ({found[dtype]})" for dtype in sorted(found))
        yield Problem(
            str(checkpoint.directory),
            f"the decoder layers mix {examples}",
            allowed="one dtype",
            fix="save the checkpoint in one dtype",
        )


def _size_problems(shape: ModelShape, name: str, group_size: int) -> Iterator[Problem]:
    """Linears that the format cannot store; a mixed one may store each as int4."""
    fmt = FORMATS["int4_awq" if name == MIXED else name]
    linears = {f"{linear}.weight" for linear in decoder_linears(shape)}
    for source in planned_sources(shape, FORMATS["fp16"]):
        if source.name not in linears or fmt.weights != "int4":
            continue
        num_outputs, num_inputs = (dim.size for dim in source.dims)
        if group_size > 0 and num_inputs % group_size:
            fits = [str(size) for size in GROUP_SIZES if num_inputs % size == 0]
            yield Problem(
                source.name,
                f"{num_inputs} input features are not a multiple of group_size {group_size}",
                allowed=f"group_size {' or '.join(fits)}" if fits else "",
                fix="" if fits else "quantize this model in another format",
            )
        if num_outputs % 2:
            yield Problem(
                source.name,
                f"{num_outputs} output features cannot be packed in pairs",
                fix="quantize this model in another format",
            )
