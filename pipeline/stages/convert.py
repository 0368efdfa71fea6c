"""convert: Hugging Face checkpoint -> one TensorRT-LLM checkpoint file per rank."""

from __future__ import annotations

from typing import Any

from pipeline.config import LoadedConfig
from pipeline.stages.stage import StageContext, StageDefaults


class Convert(StageDefaults):
    """Renames, fuses and slices tensors; never changes a quantized bit."""

    name = "convert"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The mapping only: the format is read from the checkpoint."""
        return {"mapping": loaded.config.mapping.model_dump(mode="json")}

    def run(self, context: StageContext) -> dict[str, Any]:
        """Stream every tensor once."""
        from pipeline.checkpoint.convert import convert_checkpoint

        mapping = context.loaded.config.mapping
        convert_checkpoint(
            context.inputs["checkpoint"],
            context.out_dir,
            tp=mapping.tp,
            pp=mapping.pp,
            progress=context.progress,
        )
        ranks = sorted(context.out_dir.glob("rank*.safetensors"))
        return {"ranks": len(ranks), "bytes": sum(path.stat().st_size for path in ranks)}
