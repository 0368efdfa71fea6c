"""convert: Hugging Face checkpoint -> one TensorRT-LLM checkpoint file per rank."""

from __future__ import annotations

import json
from typing import Any

from pipeline.checkpoint.options import ConvertOptions
from pipeline.checkpoint.padding import UNPADDED_FIELD
from pipeline.checkpoint.trtllm_config import CONFIG_FILE
from pipeline.config import LoadedConfig
from pipeline.errors import Problem
from pipeline.stages.launching import hostfile, launch_needs, launch_problems
from pipeline.stages.stage import StageContext, StageDefaults


class Convert(StageDefaults):
    """Renames, fuses and slices tensors. Of quantized bits it changes only FP8 codes that get the scale
    of the weights they are fused with (`pipeline.checkpoint.shared_scales`)."""

    name = "convert"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The mapping and what may change; the format is read from the checkpoint."""
        config = loaded.config
        return {
            "mapping": config.mapping.model_dump(mode="json"),
            "asymmetric": config.quantize.asymmetric,
            **config.convert.model_dump(mode="json"),
        }

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What starts several ranks."""
        return launch_needs(loaded)

    def config_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """A file of hosts that mpirun could not read."""
        return launch_problems(loaded)[0]

    def tool_problems(self, loaded: LoadedConfig) -> tuple[Problem, ...]:
        """No mpirun."""
        return launch_problems(loaded)[1]

    def run(self, context: StageContext) -> dict[str, Any]:
        """Stream every tensor once; pipeline stages at the same time where the machine allows."""
        from pipeline.checkpoint.convert_processes import convert_in_processes

        mapping = context.loaded.config.mapping
        convert_in_processes(
            context.inputs["checkpoint"],
            context.out_dir,
            tp=mapping.tp,
            pp=mapping.pp,
            moe_ep=mapping.moe_ep,
            launch=context.loaded.config.build.launch,
            hostfile=hostfile(context.loaded),
            progress=context.progress,
            options=convert_options(context.loaded),
        )
        ranks = sorted(context.out_dir.glob("rank*.safetensors"))
        facts = {"ranks": len(ranks), "bytes": sum(path.stat().st_size for path in ranks)}
        config = json.loads((context.out_dir / CONFIG_FILE).read_text("utf-8"))
        if UNPADDED_FIELD in config:
            facts["intermediate_size"] = config["intermediate_size"]
            facts[UNPADDED_FIELD] = config[UNPADDED_FIELD]
        return facts


def convert_options(loaded: LoadedConfig) -> ConvertOptions:
    """What the YAML lets conversion change."""
    return ConvertOptions(
        pad_ffn=loaded.config.mapping.pad_ffn,
        requantize_asymmetric=loaded.config.quantize.asymmetric == "requantize",
        allow_not_finite=loaded.config.convert.allow_not_finite,
    )
