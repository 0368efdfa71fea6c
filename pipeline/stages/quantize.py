"""quantize: plain Hugging Face checkpoint -> quantized Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import LoadedConfig
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.stages.texts import calibration_path


class Quantize(StageDefaults):
    """ModelOpt on the calibration text. Independent of tp and pp: a new mapping does not repeat it."""

    name = "quantize"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Format, group size and how much text; which text is an external file."""
        subset = loaded.config.quantize.model_dump(mode="json", exclude={"asymmetric"})
        del subset["calibration"]["data"]
        return subset

    def external_files(self, loaded: LoadedConfig) -> dict[str, list[Path]]:
        """The calibration text."""
        return {"calibration": [calibration_path(loaded)]}

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """Their arithmetic and their tokenizer decide the codes."""
        return ("nvidia-modelopt", "torch", "transformers", "tokenizers")

    def run(self, context: StageContext) -> dict[str, Any]:
        """Calibrate and export."""
        from pipeline.quant.calibration import load_texts
        from pipeline.quant.quantizer import QuantizeOptions, quantize_checkpoint

        quantize = context.loaded.config.quantize
        calibration = quantize.calibration
        options = QuantizeOptions(
            format=quantize.format,
            group_size=quantize.group_size,
            num_samples=calibration.num_samples,
            seq_len=calibration.seq_len,
            batch_size=calibration.batch_size,
            device=quantize.device,
        )
        texts = load_texts(calibration_path(context.loaded))
        quantize_checkpoint(
            context.inputs["source"], context.out_dir, options, texts, context.progress
        )
        report = json.loads((context.out_dir / "quant_report.json").read_text("utf-8"))
        return {
            "tokens_sha256": report["calibration"]["tokens_sha256"],
            "mean_relative_weight_error": report["mean_relative_weight_error"],
        }
