"""Finished layers on disk, one by one, so that a killed run loses at most the layer that was open.

Layout of the directory:

    fingerprint.json      everything but the layers' weights that decides the result
    embedded.hidden       hidden states that feed layer 0
    open/                 the layer that is being made; never looked at
    layer-00007/          a finished one:
        packed.safetensors    its tensors, as the artifact will hold them
        outputs.hidden        hidden states that feed the next layer; only of the last finished one
        record.json           digest of the source's weights, facts for the report

A layer's directory is complete by construction: it is written as `open/`, flushed and renamed. Hidden
states are kept instead of computed again, because writing them costs less than running all finished
layers once more; only those of the last layer are kept, so the disk holds them at most twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.store import replace_json, sync, sync_tree, write_json

SCHEMA = 1
FINGERPRINT = "fingerprint.json"
EMBEDDED = "embedded.hidden"
PACKED = "packed.safetensors"
OUTPUTS = "outputs.hidden"
RECORD = "record.json"
MEASURED = "divergences.json"
"""Where the layers were measured only: the measure that a run finishes whole or not at all."""


def finished_layers(directory: Path) -> int:
    """How many layers a later run of the same inputs will find there."""
    # The fingerprint goes first and comes last: without it nothing here is whole.
    if not (directory / FINGERPRINT).is_file():
        return 0
    count = 0
    while (_layer_dir(directory, count) / RECORD).is_file():
        count += 1
    if count and not (_layer_dir(directory, count - 1) / OUTPUTS).is_file():
        return 0
    return count


def _layer_dir(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:05d}"


class FinishedLayers:
    """The finished layers of one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._open_dir, ignore_errors=True)

    @property
    def _open_dir(self) -> Path:
        return self.directory / "open"

    @property
    def embedded_path(self) -> Path:
        """Where the inputs of layer 0 go."""
        return self.directory / EMBEDDED

    def layer_dir(self, layer: int) -> Path:
        """Of a finished layer."""
        return _layer_dir(self.directory, layer)

    def resume(
        self, fingerprint: Mapping[str, Any], layer_digest: Callable[[int], str]
    ) -> tuple[int, list[str]]:
        """How many layers are finished; what belongs to other inputs is removed.

        Args:
            fingerprint: of this run, plain JSON.
            layer_digest: of the source's weights of a layer.

        Returns:
            The number of layers, and why older ones were removed: each field that changed.
        """
        wanted = json.loads(json.dumps({"schema": SCHEMA, **fingerprint}))
        path = self.directory / FINGERPRINT
        changes = []
        finished = finished_layers(self.directory)
        if finished:
            old = _read(path)
            changes = [
                f"{field} was {_short(old.get(field))}, is {_short(wanted.get(field))}"
                for field in sorted(old.keys() | wanted.keys())
                if old.get(field) != wanted.get(field)
            ]
        if not changes:
            changes = [
                f"weights of layer {layer} are not those it was made of"
                for layer in range(finished)
                if self.record(layer)["weights_sha256"] != layer_digest(layer)
            ]
        if changes or not finished:
            self._clear()
            replace_json(path, wanted)
            return 0, changes
        return finished, []

    def open_layer(self) -> Path:
        """An empty directory for the layer that is next."""
        shutil.rmtree(self._open_dir, ignore_errors=True)
        self._open_dir.mkdir()
        return self._open_dir

    def commit(self, layer: int, record: Mapping[str, Any]) -> None:
        """Make the open layer a finished one; the hidden states before it are not needed any more."""
        write_json(self._open_dir / RECORD, dict(record))
        sync_tree(self._open_dir)
        self._open_dir.rename(self.layer_dir(layer))
        sync(self.directory)
        self._remove_older_outputs(layer)

    def record(self, layer: int) -> dict[str, Any]:
        """What was noted of a finished layer."""
        return _read(self.layer_dir(layer) / RECORD)

    def packed(self, layer: int) -> Path:
        """The tensors of a finished layer."""
        return self.layer_dir(layer) / PACKED

    def inputs_path(self, layer: int) -> Path:
        """The hidden states that feed a layer, if the one before it is the last finished one."""
        return self.layer_dir(layer - 1) / OUTPUTS if layer else self.embedded_path

    def _remove_older_outputs(self, layer: int) -> None:
        self.embedded_path.unlink(missing_ok=True)
        for older in range(layer):
            (self.layer_dir(older) / OUTPUTS).unlink(missing_ok=True)

    def _clear(self) -> None:
        (self.directory / FINGERPRINT).unlink(missing_ok=True)
        sync(self.directory)
        for child in self.directory.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            else:
                child.unlink()


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
