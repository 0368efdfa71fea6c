"""Checkpoints on disk: reading, checking, converting, and making synthetic ones.

Hugging Face layout in, TensorRT-LLM layout (config.json + rank{r}.safetensors) out.
"""

from __future__ import annotations

from pipeline.checkpoint.layout import mapping_problems, planned_bytes, planned_tensors
from pipeline.checkpoint.source import (
    HfCheckpoint,
    detect_format,
    open_checkpoint,
    read_config,
    read_format,
)

__all__ = [
    "HfCheckpoint",
    "detect_format",
    "mapping_problems",
    "open_checkpoint",
    "planned_bytes",
    "planned_tensors",
    "read_config",
    "read_format",
]
