"""NVIDIA ModelOpt's INT4 AWQ: a plain Hugging Face checkpoint becomes a quantized one.

The whole model is in memory, in the checkpoint's own dtype. Device "cuda" is written, but only the CPU
has been run and tested.

ModelOpt searches a scale for q, k and v (and for gate and up) one by one, then, when it exports,
replaces the scales of such a group by their mean and quantizes those weights again. The exported
model is therefore not quite the one that the search measured. What counts is what is in the file, so
the facts in quant_report.json and the verification of the engine are measured on exported bytes.

Shape suffixes: B windows of one batch, T tokens of one window.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.source import HfCheckpoint, read_format
from pipeline.errors import Problem, StageError, ToolError
from pipeline.progress import Progress
from pipeline.quant.calibration import TokenWindows, token_windows
from pipeline.quant.formats import FORMATS
from pipeline.quant.preflight import QUANTIZERS, QuantizeOptions, check_source, linears_to_quantize
from pipeline.quant.report import audit_export, write_quant_report
from pipeline.quant.source import (
    SourceTokenizer,
    copy_companions,
    load_model,
    refuse_foreign_tokens,
)

if TYPE_CHECKING:
    import torch

__all__ = ["QuantizeOptions", "quantize_checkpoint"]

FORWARD_PASSES = 2  # awq_lite: one for activation statistics, one for the search

REWRITTEN_FIELDS = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
"""Fields of config.json that transformers or ModelOpt spell in their own way."""

CHECKED_WARNINGS = (
    "`torch.jit.",  # deprecations inside torch
    # Both ask for transformers 5; which tensors are there, and their names, is checked by the audit.
    "This model may contain tied/shared weights",
    "Quant-aware reverse weight conversion skipped",
)

_TORCH_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True)
class SearchFacts:
    """What ModelOpt's search found for one linear.

    Attributes:
        alpha: exponent of the activation statistic in the scale.
        mean_squared_error: of the layer's output at that alpha, before scales are averaged.
    """

    alpha: float
    mean_squared_error: float


def quantize_checkpoint(
    source_dir: Path,
    out_dir: Path,
    options: QuantizeOptions,
    texts: Sequence[str],
    progress: Progress,
) -> None:
    """Calibrate on `texts` and write a checkpoint in ModelOpt's unified Hugging Face layout.

    Writes into the existing directory `out_dir`: safetensors (uint8 weights [out / 2, in], float32
    weight_scale [out, in / group_size], pre_quant_scale [in] for o_proj and down_proj; the other
    scales are folded into the norms), config.json (the source's, with quantization_config),
    hf_quant_config.json, the tokenizer files and quant_report.json. The same input gives the same
    bytes (same versions, same number of threads).

    Raises:
        CheckpointError: see `check_source` and `load_model`; also a tokenizer with more tokens than
            the model has embeddings.
        PlanError: unusable options, or too little text.
        StageError: activations or a search that are not finite, or an export that is not what it
            should be.
    """
    checkpoint = check_source(source_dir, options)
    windows = token_windows(
        texts,
        SourceTokenizer(source_dir),
        num_windows=options.num_samples,
        seq_len=options.seq_len,
        seed=options.seed,
        what="calibration text",
    )
    refuse_foreign_tokens(windows, checkpoint.shape.vocab_size, source_dir)

    names = linears_to_quantize(checkpoint.shape)
    progress.say(
        f"calibrating {len(names)} linears on {options.num_samples} windows of {options.seq_len} "
        f"tokens (sha256 {windows.digest[:16]})"
    )
    with _quiet_torch(options.num_threads, progress):
        search, device = _calibrate_and_export(checkpoint, out_dir, options, windows, progress)
    _check_search(search, names)
    _restore_config(checkpoint.config, out_dir)
    _check_quant_config(out_dir, options)
    copy_companions(source_dir, out_dir)
    progress.say("measuring the exported weights")
    write_quant_report(
        out_dir / "quant_report.json",
        options=options,
        windows=windows,
        device=device,
        search={name: (facts.alpha, facts.mean_squared_error) for name, facts in search.items()},
        weight_errors=audit_export(checkpoint, out_dir, read_format(out_dir)),
    )


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


def _calibrate_and_export(
    checkpoint: HfCheckpoint,
    out_dir: Path,
    options: QuantizeOptions,
    windows: TokenWindows,
    progress: Progress,
) -> tuple[dict[str, SearchFacts], str]:
    """Everything that needs the model in memory; it is freed on return."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    from pipeline.quant.float32_products import float32_products

    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        fix = "set quantize.device: cpu, or install torch with CUDA on a machine with a GPU"
        raise ToolError(Problem("quantize.device", "torch finds no CUDA device", fix=fix))
    model = load_model(checkpoint.directory, _checkpoint_dtype(checkpoint)).to(device)
    progress.start(FORWARD_PASSES * math.ceil(options.num_samples / options.batch_size), "batches")

    def forward_loop(calibrated: Any) -> None:
        for index, tokens_BT in enumerate(windows.batches(options.batch_size)):
            input_ids = torch.from_numpy(tokens_BT.copy()).to(device)
            with torch.no_grad():
                output = calibrated(input_ids=input_ids, use_cache=False, logits_to_keep=1)
            # The last position attends to all others, so it shows what is not finite anywhere before
            # the last MLP; there, the losses of the search show it.
            if not bool(torch.isfinite(output.logits).all()):
                raise StageError(_not_finite(index, options))
            progress.advance()

    with float32_products():
        mtq.quantize(model, _modelopt_config(mtq, options), forward_loop)
    search = _take_search_facts(model)
    progress.say("exporting")
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=out_dir)
    return search, device


def _checkpoint_dtype(checkpoint: HfCheckpoint) -> torch.dtype:
    """The dtype of the decoder's matrices on disk; `check_source` has seen that there is just one."""
    import torch

    name = linears_to_quantize(checkpoint.shape)[0]
    info = checkpoint.reader.tensors[f"{name}.weight"]
    dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[info.dtype])
    return dtype


def _modelopt_config(mtq: Any, options: QuantizeOptions) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(mtq.INT4_AWQ_CFG)
    changed = 0
    for entry in config["quant_cfg"]:
        block_sizes = (entry.get("cfg") or {}).get("block_sizes")
        if block_sizes:
            block_sizes[-1] = options.group_size
            changed += 1
    assert changed == 1, f"INT4_AWQ_CFG has {changed} entries with block sizes, not one"
    algorithm = QUANTIZERS[options.format]
    assert config["algorithm"]["method"] == algorithm, config["algorithm"]
    config["algorithm"]["debug"] = True  # keeps alphas and losses on the modules
    return config


def _not_finite(batch_index: int, options: QuantizeOptions) -> Problem:
    first = batch_index * options.batch_size
    last = min(first + options.batch_size, options.num_samples) - 1
    return Problem(
        f"calibration windows {first} to {last}",
        "the model's output is not finite",
        fix="check the weights for NaN; a model made for bf16 can overflow in fp16",
    )


def _take_search_facts(model: Any) -> dict[str, SearchFacts]:
    """Read and remove what awq_lite left on the modules.

    Raises:
        StageError: ModelOpt gave up on a linear (it only warns, and rounds to nearest), or a loss is
            not finite (its minimum over alphas would then be arbitrary).
    """
    facts: dict[str, SearchFacts] = {}
    problems: list[Problem] = []
    for name, module in model.named_modules():
        search = getattr(module, "awq_lite", None)
        if search is None:
            continue
        losses = list(search.loss.values())
        if not search.is_enabled or not all(math.isfinite(float(loss)) for loss in losses):
            problems.append(
                Problem(name, "no scale was found: its activations or losses are not finite")
            )
        else:
            loss = float(search.loss[search.best_alpha]) / search.num_search_steps
            # The grid is float32 tenths: 0.30000001192...
            facts[name] = SearchFacts(round(float(search.best_alpha), 6), loss)
        del module.awq_lite
    if problems:
        raise StageError(problems)
    return facts


def _check_search(search: dict[str, SearchFacts], names: Sequence[str]) -> None:
    """ModelOpt must have quantized exactly the linears of the architecture's table."""
    problems = [
        Problem(name, "ModelOpt did not quantize this linear")
        for name in names
        if name not in search
    ]
    problems += [
        Problem(name, "ModelOpt quantized this, which should stay as it is")
        for name in search
        if name not in names
    ]
    if problems:
        raise StageError(problems)


def _restore_config(raw_config: dict[str, Any], out_dir: Path) -> None:
    """Write the source's own config.json with ModelOpt's quantization_config added.

    transformers and ModelOpt rewrite RoPE fields (and with other versions lose them), so every field
    stays the source's. Any other field that they changed would mean another model, and is an error.
    """
    path = out_dir / "config.json"
    exported = json.loads(path.read_text(encoding="utf-8"))
    quantization = exported.get("quantization_config")
    if not quantization:
        raise StageError(Problem(str(path), "ModelOpt wrote no quantization_config"))
    problems = [
        Problem(f"{path}: {key}", f"changed from {value!r} to {exported[key]!r} by the export")
        for key, value in raw_config.items()
        if key in exported and exported[key] != value and key not in REWRITTEN_FIELDS
    ]
    if problems:
        raise StageError(problems)
    config = {**raw_config, "quantization_config": quantization}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_quant_config(out_dir: Path, options: QuantizeOptions) -> None:
    """What the export says of itself must be what was asked for."""
    written = read_format(out_dir)
    expected = FORMATS[options.format].with_group_size(options.group_size)
    if written != expected:
        what = f"says {written.name} with group size {written.group_size}"
        allowed = f"{expected.name} with group size {expected.group_size}"
        raise StageError(Problem(str(out_dir / "hf_quant_config.json"), what, allowed))
