"""Every architecture, every mapping: the ranks together hold each source, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint import mapping_problems
from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.checkpoint.layout import planned_sources
from pipeline.models import ARCHITECTURES, shape_from_hf
from pipeline.progress import SilentProgress
from pipeline.quant.formats import FORMATS
from tests.restore import restore
from tests.tiny_models import ALWAYS_TIED, TINY, tiny_config, write_tiny

MAPPINGS = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 3, 4)]
# Sizes that every tp can cut, and a number of layers that pp = 3 cannot share out evenly.
CUT: dict[str, Any] = {"num_attention_heads": 8, "hidden_size": 128, "num_hidden_layers": 4}


def test_every_architecture_has_a_model() -> None:
    assert TINY.keys() == ARCHITECTURES.keys()


@pytest.fixture(scope="module", params=TINY)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp("source") / "model", **CUT)


@pytest.mark.parametrize(("tp", "pp"), MAPPINGS)
def test_round_trip(source: Path, tmp_path: Path, tp: int, pp: int) -> None:
    shape = shape_from_hf(json.loads((source / "config.json").read_text()))
    fmt = FORMATS["fp16"]
    assert mapping_problems(shape, fmt, tp, pp) == []
    convert_checkpoint(source, tmp_path, tp=tp, pp=pp, progress=SilentProgress())
    _assert_restored(source, restore(tmp_path, shape, tp=tp, pp=pp))


def _assert_restored(source: Path, restored: dict[str, np.ndarray]) -> None:
    shape = shape_from_hf(json.loads((source / "config.json").read_text()))
    offsets = {tensor.name: tensor.offset for tensor in planned_sources(shape, FORMATS["fp16"])}
    wanted = load_file(source / "model.safetensors")
    assert restored.keys() == wanted.keys()
    for name, values in wanted.items():
        expected = values
        if offsets[name]:
            expected = (values.astype(np.float32) + offsets[name]).astype(np.float16)
        if restored[name].dtype == np.float32:  # routers
            expected = expected.astype(np.float32)
        assert restored[name].dtype == expected.dtype, name
        assert restored[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        (architecture, tied)
        for architecture in TINY
        for tied in ((True,) if architecture in ALWAYS_TIED else (False, True))
    ],
)
def test_table_names_every_parameter_of_transformers(architecture: str, tied: bool) -> None:
    """transformers is the judge of names and shapes of the sources."""
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    fields = tiny_config(architecture, tie_word_embeddings=tied)
    config = model_class.config_class.from_dict(fields)
    with torch.device("meta"):
        model = model_class(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sources = planned_sources(shape_from_hf(fields), FORMATS["fp16"])
    assert {source.name: source.shape for source in sources} == wanted
