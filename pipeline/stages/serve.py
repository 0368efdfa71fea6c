"""serve: engine -> Triton model repository."""

from __future__ import annotations

from typing import Any

from pipeline.config import LoadedConfig
from pipeline.stages.stage import StageContext, StageDefaults


class Serve(StageDefaults):
    """Emits the repository; `trtpipe serve` starts the server on it."""

    name = "serve"
    version = 1

    def config_subset(self, loaded: LoadedConfig) -> dict[str, Any]:
        """The model's name: ports and host belong to a start of the server, not to the repository."""
        return {"model_name": loaded.served_name}

    def needs(self, loaded: LoadedConfig) -> tuple[str, ...]:
        """The schema that every config.pbtxt is read back through."""
        return ("tritonclient",)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the repository; the engine's files are linked into it."""
        from pipeline.serving.repository import RepositoryOptions, emit_repository

        options = RepositoryOptions(model_name=context.loaded.served_name)
        emit_repository(context.inputs["engine"], context.out_dir, options)
        return {"model_name": context.loaded.served_name}
