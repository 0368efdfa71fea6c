"""A plain Hugging Face checkpoint becomes a quantized one, decoder layer by decoder layer.

In memory is one layer with what its quantization needs; the hidden states that feed it lie in a
file. Every finished layer is committed to a work directory, so a killed run loses one layer at most.
Device "cuda" is written, but only the CPU has been run and tested.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.source import HfCheckpoint
from pipeline.progress import Progress
from pipeline.quant.data import TokenWindows, token_windows
from pipeline.quant.formats import MIXED
from pipeline.quant.preflight import QuantizeOptions, check_source
from pipeline.quant.source import SourceTokenizer, refuse_foreign_tokens

if TYPE_CHECKING:
    from pipeline.quant.layers.run import LayerTools

__all__ = ["QuantizeOptions", "quantize_checkpoint", "quantize_windows"]

UNFINISHED = ".layers"
"""Where layers lie that nobody wants to continue from."""

CHECKED_WARNINGS = (
    "`torch.jit.",  # deprecations inside torch
    # Both ask for transformers 5; which tensors are there, and their names, is checked at the end.
    "This model may contain tied/shared weights",
    "Quant-aware reverse weight conversion skipped",
)


def quantize_checkpoint(
    source_dir: Path,
    out_dir: Path,
    options: QuantizeOptions,
    texts: Sequence[str],
    progress: Progress,
    work_dir: Path | None = None,
) -> None:
    """`quantize_windows` on windows cut from `texts`."""
    checkpoint = check_source(source_dir, options)
    windows = token_windows(
        texts,
        SourceTokenizer(source_dir),
        num_windows=options.num_samples,
        seq_len=options.seq_len,
        seed=options.seed,
        what="calibration text",
    )
    quantize_windows(checkpoint, out_dir, options, windows, progress, work_dir=work_dir)


def quantize_windows(
    checkpoint: HfCheckpoint,
    out_dir: Path,
    options: QuantizeOptions,
    windows: TokenWindows,
    progress: Progress,
    *,
    work_dir: Path | None = None,
    chosen: Mapping[str, str] | None = None,
    tools: LayerTools | None = None,
) -> None:
    """Calibrate on `windows` and write a checkpoint in ModelOpt's unified Hugging Face layout.

    Writes into the existing directory `out_dir`: safetensors, config.json (the source's, with
    quantization_config), hf_quant_config.json, the tokenizer files and quant_report.json. The same
    input gives the same bytes (same versions, same number of threads), also when a run was killed and
    continued from its `work_dir`.

    Args:
        checkpoint: from `check_source`.
        work_dir: keeps finished layers until the caller removes it; best on the file system of
            `out_dir`, whose large shards are then links. None: nothing can be continued.
        chosen: with format "mixed", the format of each linear by its full name; None: chosen here by
            `options.budget_bits`, and sensitivity.json and sensitivity.svg are written too.
        tools: how a layer is quantized and packed; None: `search.layer` and `packing.layer`, as ever.

    Raises:
        CheckpointError: a tokenizer with more tokens than the model has embeddings; weights that are
            not finite.
        StageError: activations or a search that are not finite, no room on the disk, or an export
            that is not what it should be.
        ToolError: device "cuda" without one.
    """
    from pipeline.quant.layers.run import LayerwiseRun
    from pipeline.quant.sensitivity.choice import add_to_report, choose_formats

    refuse_foreign_tokens(windows, checkpoint.shape.vocab_size, checkpoint.directory)
    own_dir = work_dir or out_dir / UNFINISHED
    with _quiet_torch(options.num_threads, progress):
        if options.format == MIXED and chosen is None:
            measured_dir = own_dir.with_name(f"{own_dir.name}-sensitivity")
            chosen = choose_formats(checkpoint, options, windows, progress, measured_dir, out_dir)
            if work_dir is None:
                shutil.rmtree(measured_dir)
        run = LayerwiseRun(checkpoint, options, windows, progress, own_dir, chosen, tools)
        run.make_layers()
        progress.say("writing the checkpoint")
        run.write(out_dir)
        add_to_report(out_dir)
    if work_dir is None:
        shutil.rmtree(own_dir)


@contextlib.contextmanager
def _quiet_torch(num_threads: int | None, progress: Progress) -> Iterator[None]:
    """float32 as default dtype, the configured threads, ModelOpt's prints on standard error.

    Under another default dtype ModelOpt's grid of alphas is itself rounded to that dtype. Warnings
    are said once each, after the work.
    """
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            for text in dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught):
                if not text.startswith(CHECKED_WARNINGS):
                    progress.say(f"library warning: {text}")
