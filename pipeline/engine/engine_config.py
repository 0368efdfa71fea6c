"""config.json of an engine directory, with the sections that TensorRT-LLM writes there.

Beside it quant_cfg.json of the checkpoint, where linears have different formats.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from pipeline.checkpoint.trtllm_config import QUANT_FILE
from pipeline.errors import CheckpointError, Problem
from pipeline.network.limits import BuildLimits

CONFIG_FILE = "config.json"


def write_engine_config(checkpoint_dir: Path, engine_dir: Path, limits: BuildLimits) -> None:
    """Write {"pretrained_config", "build_config"} once for all ranks.

    TensorRT-LLM's `version` is left out: it would be read as the version of TensorRT-LLM. What made the
    engine stands in manifest.json.

    Raises:
        CheckpointError: the checkpoint's config.json cannot be read.
    """
    source = checkpoint_dir / CONFIG_FILE
    try:
        pretrained = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(source), f"cannot be read: {error}")) from error
    config = {
        "pretrained_config": pretrained,
        "build_config": asdict(limits),
    }
    text = json.dumps(config, indent=2) + "\n"
    (engine_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
    if (checkpoint_dir / QUANT_FILE).exists():
        shutil.copyfile(checkpoint_dir / QUANT_FILE, engine_dir / QUANT_FILE)
