"""quantize: plain Hugging Face checkpoint -> quantized Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import LoadedConfig, QuantizeConfig
from pipeline.quant.choose import algorithm_of, budget_bits
from pipeline.quant.data import CalibrationData
from pipeline.quant.formats import FORMATS, GROUP_SIZES, MIXABLE, MIXED
from pipeline.quant.layers.commits import MEASURED, finished_layers
from pipeline.quant.recipe import ALGORITHMS
from pipeline.stages.quantize_problems import formats_to_mix
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.stages.texts import (
    calibration_path,
    calibration_subset,
    heldout_warnings,
    load_calibration,
    needed_to_read,
)

_LAYERS = "layers"


class Quantize(StageDefaults):
    """ModelOpt on the calibration text. Independent of tp and pp: a new mapping does not repeat it."""

    name = "quantize"
    version = 3
    resumable = True

    def finished_parts(self, work_dir: Path) -> str:
        """Layers, quantized or measured; without one of them the rest is made again in no time."""
        measured_dir = work_dir / f"{_LAYERS}-sensitivity"
        quantized, measured = map(finished_layers, (work_dir / _LAYERS, measured_dir))
        parts = [
            f"layers quantized: {quantized}" if quantized else "",
            f"layers measured: {measured}" if measured else "",
            "divergences measured" if (measured_dir / MEASURED).is_file() else "",
        ]
        return ", ".join(filter(None, parts))

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Everything but where activations lie, and which text: a local one is an external file."""
        unread = {"asymmetric", "max_memory_gb", "calibration", "sensitivity"}
        quantize = effective(loaded.config.quantize)
        subset = quantize.model_dump(mode="json", exclude=unread)
        if quantize.lm_head == "fp16":
            del subset["lm_head"]  # so that what was made before there was a choice is still found
        if quantize.format == MIXED:
            subset["sensitivity"] = quantize.sensitivity
            subset["candidates"] = list(formats_to_mix(loaded))
        return {**subset, "calibration": calibration_subset(loaded)}

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """The calibration text, when it is a local file."""
        path = calibration_path(loaded)
        return {} if path is None else {"calibration": [path]}

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Their arithmetic and their tokenizer decide the codes."""
        return ("nvidia-modelopt", "torch", "transformers", "tokenizers")

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What reads the text."""
        return needed_to_read(calibration_path(loaded))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Calibrate and export."""
        from pipeline.quant.preflight import check_source
        from pipeline.quant.quantizer import QuantizeOptions, quantize_windows
        from pipeline.quant.source import SourceTokenizer

        quantize = effective(context.loaded.config.quantize)
        calibration = quantize.calibration
        memory_gb = quantize.max_memory_gb
        options = QuantizeOptions(
            format=quantize.format,
            group_size=quantize.group_size,
            num_samples=calibration.num_samples,
            seq_len=calibration.seq_len,
            batch_size=calibration.batch_size,
            seed=calibration.seed,
            device=quantize.device,
            algorithm=quantize.algorithm,
            search=quantize.search,
            kv_cache=quantize.kv_cache,
            inputs=calibration.inputs,
            keep=quantize.keep,
            lm_head=quantize.lm_head,
            max_memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
            **_mixed_options(context.loaded),
        )
        source_dir = context.inputs["source"]
        checkpoint = check_source(source_dir, options)
        encoder = SourceTokenizer(source_dir)
        data = load_calibration(context.loaded, encoder, checkpoint.shape.vocab_size)
        for warning in (*data.warnings, *heldout_warnings(context.loaded, data)):
            context.progress.say(f"warning: {warning}")
        assert context.work_dir is not None
        quantize_windows(
            checkpoint,
            context.out_dir,
            options,
            data.windows,
            context.progress,
            work_dir=context.work_dir / _LAYERS,
        )
        report = _add_data_report(context.out_dir / "quant_report.json", data)
        mixed = {"mixed": report["mixed"]} if "mixed" in report else {}
        return {
            **mixed,
            "tokens_sha256": report["calibration"]["tokens_sha256"],
            "mean_relative_weight_error": report["mean_relative_weight_error"],
            "calibration_warnings": list(data.warnings),
        }


def effective(quantize: QuantizeConfig) -> QuantizeConfig:
    """The section without what changes nothing, so that two ways to say the same have one key.

    The usual algorithm is none, a format without groups has the usual group size, and `keep` has no
    order.
    """
    wanted = MIXABLE if quantize.format == MIXED else (quantize.format,)
    formats = [name for name in wanted if name in ALGORITHMS]
    asked = quantize.algorithm
    usual = all(algorithm_of(name, asked) == ALGORITHMS[name][0] for name in formats)
    grouped = any(FORMATS[name].group_size for name in formats)
    changes = {
        "algorithm": None if usual else asked,
        "group_size": quantize.group_size if grouped else GROUP_SIZES[-1],
        "keep": tuple(sorted(set(quantize.keep))),
    }
    return quantize.model_copy(update=changes)


def _mixed_options(loaded: LoadedConfig) -> dict[str, Any]:
    """Fields of QuantizeOptions that only format mixed has."""
    quantize = loaded.config.quantize
    if quantize.format != MIXED:
        return {}
    return {
        "budget_bits": budget_bits(quantize.budget or ""),
        "candidates": formats_to_mix(loaded),
        "sensitivity": quantize.sensitivity,
    }


def _add_data_report(path: Path, data: CalibrationData) -> dict[str, Any]:
    """Put what is known about the texts beside what the quantizer wrote about the windows."""
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    report["calibration"].update(data.report)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
    return report
