"""One more architecture: what one file declares, and one line in the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.models import ARCHITECTURES, ModelShape
from pipeline.models.architecture import Architecture
from pipeline.models.decoder import Activation, Decoder
from pipeline.models.llama import LLAMA
from pipeline.network import BuildLimits, cpu_graph_path, export_network
from pipeline.network.spec_reader import read_spec
from pipeline.progress import SilentProgress
from tests.tiny import write_tiny_llama


def _shape_from_hf(config: Mapping[str, Any]) -> ModelShape:
    return replace(LLAMA.shape_from_hf(config), architecture="NewForCausalLM", hidden_act="smooth")


NEW = Architecture(
    name="NewForCausalLM",
    rules=LLAMA.rules,
    decoder=Decoder(activations={"smooth": Activation.GELU_TANH}, scaled_embedding=True),
    shape_from_hf=_shape_from_hf,
)


def test_converted_and_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_llama(tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "architectures": [NEW.name]}))
    monkeypatch.setitem(ARCHITECTURES, NEW.name, NEW)  # the one line

    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    engine.mkdir()
    convert_checkpoint(source, checkpoint, tp=1, pp=1, progress=SilentProgress())
    config = json.loads((checkpoint / "config.json").read_text())
    features = read_spec(config, "config.json").features
    assert features.activation is Activation.GELU_TANH
    assert features.embedding_scale == fields["hidden_size"] ** 0.5
    export_network(checkpoint, 0, engine, BuildLimits(1, 16, 8), SilentProgress())
    assert cpu_graph_path(engine, 0).stat().st_size > 0
