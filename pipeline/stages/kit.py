"""kit: what another machine needs to build the engine, where this one lacks the tool or the GPU."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline import __version__
from pipeline.build_config import BYTE_NEUTRAL
from pipeline.config import LoadedConfig
from pipeline.engine.tensorrt_request import TensorRtRequest
from pipeline.engine.trtllm_build import checkpoint_subject
from pipeline.engine.trtllm_flags import build_arguments
from pipeline.packaging import CheckpointKit, NetworkKit, write_kit
from pipeline.quant.backends import TENSORRT_LLM
from pipeline.stages.build import build_limits, plan_options
from pipeline.stages.stage import StageContext, StageDefaults
from pipeline.store import list_files
from pipeline.targets import TARGETS
from pipeline.tensorrt_llm_config import image_of

KIT_DIR = "build-kit"
_OF_THIS_MACHINE: dict[str, Any] = {
    "serve": True,
    "run": True,
    "quantize": {"max_memory_gb"},
    "build": BYTE_NEUTRAL,
}
"""What the kit's YAML leaves out: it means nothing elsewhere, and decides no byte of the engine."""


class MakeKit(StageDefaults):
    """Writes the kit into a directory of its own beside what is published anyway."""

    name = "kit"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The YAML lies in the kit, but for what belongs to this machine."""
        return {**_resolved(loaded), "made_by": __version__}

    def tools(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """What writes the tokenizer."""
        return ("transformers", "tokenizers")

    def target_sm(self, loaded: LoadedConfig) -> int | None:
        """Of the GPU that it asks for."""
        return TARGETS[loaded.config.target].sm

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the kit."""
        from pipeline.runtime.tokenizer import save_tokenizer

        out_dir = context.out_dir / KIT_DIR
        out_dir.mkdir()
        # First, because the kit's checksums cover it.
        save_tokenizer(context.inputs["source"], out_dir / "tokenizer")
        if context.loaded.config.build.backend == TENSORRT_LLM:
            write_kit(_checkpoint_kit(context), out_dir)
        else:
            write_kit(_network_kit(context), out_dir)
        return {"kit_bytes": sum(path.stat().st_size for path in list_files(out_dir))}


def _checkpoint_kit(context: StageContext) -> CheckpointKit:
    config, checkpoint_dir = context.loaded.config, context.inputs["checkpoint"]
    options = config.build.tensorrt_llm
    subject = checkpoint_subject(config.build, TARGETS[config.target].sm, checkpoint_dir)
    return CheckpointKit(
        **_common(context),
        workers=options.workers,
        image=image_of(options.environment) or "",
        arguments=build_arguments(subject),
    )


def _network_kit(context: StageContext) -> NetworkKit:
    config = context.loaded.config
    limits, world_size = build_limits(context.loaded), config.mapping.world_size
    requests = [
        TensorRtRequest(rank, config.target, limits, plan_options(config.build.tensorrt)).to_json()
        for rank in range(world_size)
    ]
    return NetworkKit(
        **_common(context),
        workers=1,
        image="",
        engine_dir=context.inputs["engine"],
        requests=requests,
    )


def _common(context: StageContext) -> dict[str, Any]:
    """Fields that kits of both kinds have."""
    config = context.loaded.config
    return {
        "name": config.name,
        "target": TARGETS[config.target],
        "world_size": config.mapping.world_size,
        "config_yaml": yaml.safe_dump(_resolved(context.loaded), sort_keys=False),
        "checkpoint_dir": context.inputs["checkpoint"],
    }


def _resolved(loaded: LoadedConfig) -> dict[str, Any]:
    """Every value of the YAML, defaults included, but those that belong to this machine."""
    return loaded.config.model_dump(mode="json", exclude=_OF_THIS_MACHINE)
