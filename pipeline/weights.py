"""The one override of the command line: other weights for the same build (`WEIGHTS=`)."""

from __future__ import annotations

from typing import Any

from pipeline.checkpoint import read_config
from pipeline.config import DirectorySource, HubSource, LoadedConfig, SyntheticSource
from pipeline.errors import CheckpointError, PlanError, Problem
from pipeline.links import possible_path
from pipeline.stages.fetch import local_directory, no_checkpoint

SYNTHETIC = "synthetic"


def override_weights(loaded: LoadedConfig, weights: str) -> LoadedConfig:
    """The same build from `weights`: a directory in Hugging Face layout, or "synthetic".

    A rehearsal with synthetic weights gets a name of its own, so that it never replaces a real engine.

    Raises:
        PlanError: "synthetic" for a Hub model whose YAML has no `model.shape`; no possible path.
        CheckpointError: the directory, or its config.json, is missing or unreadable.
    """
    if weights != SYNTHETIC:
        try:
            path = possible_path(weights).absolute()
        except ValueError as error:
            raise PlanError(Problem("--weights", str(error))) from None
        if not (path / "config.json").is_file():
            raise CheckpointError(no_checkpoint(path))
        return loaded.replaced(model=DirectorySource(source="directory", path=str(path)))
    model = SyntheticSource(source="synthetic", shape=model_shape_fields(loaded))
    return loaded.replaced(model=model, name=f"{loaded.config.name}-synthetic")


def model_shape_fields(loaded: LoadedConfig) -> dict[str, Any]:
    """config.json of the model, from the YAML or from the local directory.

    Raises:
        PlanError: neither has it.
        CheckpointError: config.json is not JSON.
    """
    model = loaded.config.model
    if isinstance(model, SyntheticSource):
        return model.shape
    if isinstance(model, HubSource):
        if model.shape is None:
            raise PlanError(
                Problem(
                    loaded.where("model", "shape"),
                    "synthetic weights need the model's shape",
                    fix="put the fields of the model's config.json under model.shape",
                )
            )
        return model.shape
    directory = local_directory(loaded)
    assert directory is not None
    return read_config(directory)
