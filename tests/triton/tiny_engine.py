"""A tiny random engine with a throw-away tokenizer, made by the real packages in about a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.checkpoint.convert import convert_checkpoint
from pipeline.engine import write_engine_config
from pipeline.network import BuildLimits, export_network
from pipeline.progress import SilentProgress
from pipeline.runtime.tokenizer import save_tokenizer
from tests.tiny import write_tiny_llama
from tests.triton.tokenizers_for_tests import KINDS, save


def build_tiny_engine(
    directory: Path,
    limits: BuildLimits,
    kind: str = "byte_level",
    eos_ids: Sequence[int] = (2,),
) -> Path:
    """Write source, checkpoint and engine below `directory`; returns the engine's directory."""
    source = write_tiny_llama(directory / "source", max_position_embeddings=limits.max_seq_len)
    save(KINDS[kind](), source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": list(eos_ids)}))
    checkpoint, engine = directory / "checkpoint", directory / "engine"
    checkpoint.mkdir()
    engine.mkdir()
    convert_checkpoint(source, checkpoint, tp=1, pp=1, progress=SilentProgress())
    export_network(checkpoint, 0, engine, limits, SilentProgress())
    write_engine_config(checkpoint, engine, limits)
    save_tokenizer(source, engine / "tokenizer")
    return engine
