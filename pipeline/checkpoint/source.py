"""A Hugging Face checkpoint directory: its raw config, its weight format, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.strict_json import parse_object
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ModelShape, shape_from_hf
from pipeline.quant.formats import FORMATS, GROUP_SIZES, QuantFormat

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
SUPPORTED = "plain float16/bfloat16/float32 weights, ModelOpt unified int4_awq (W4A16_AWQ)"

# ModelOpt lists what it left alone. Anything else means that layers differ, which no table describes.
_LEFT_ALONE = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class HfCheckpoint:
    """What a directory holds; weights are not read yet.

    Attributes:
        config: raw config.json.
    """

    directory: Path
    config: dict[str, Any]
    shape: ModelShape
    format: QuantFormat
    reader: CheckpointReader


def open_checkpoint(directory: Path) -> HfCheckpoint:
    """Opens a Hugging Face checkpoint: config and headers only.

    Raises:
        CheckpointError: config or headers are missing, corrupt or not supported.
    """
    config = read_config(directory)
    return HfCheckpoint(
        directory=directory,
        config=config,
        shape=shape_from_hf(config),
        format=read_format(directory),
        reader=CheckpointReader(directory),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The raw config.json. Raises CheckpointError."""
    return _read_json(directory / CONFIG_FILE)


def detect_format(source_dir: Path) -> str:
    """Name of the weight format of a Hugging Face checkpoint: "fp16" or "int4_awq".

    Raises:
        CheckpointError: quantized in another way; names what is supported.
    """
    return read_format(source_dir).name


def read_format(source_dir: Path) -> QuantFormat:
    """The weight format of a Hugging Face checkpoint, with its group size. Raises CheckpointError."""
    declared = read_config(source_dir).get("quantization_config")
    path = source_dir / QUANT_CONFIG_FILE
    where = f"{CONFIG_FILE}: quantization_config"
    if not isinstance(declared, dict | None):
        raise CheckpointError(Problem(where, f"{declared!r}", "null, a mapping"))
    method = "modelopt" if declared is None else declared.get("quant_method")
    if method != "modelopt":
        what = f"quant_method {method!r} is not supported"
        raise CheckpointError(Problem(where, what, SUPPORTED))
    if path.exists():
        return _modelopt_format(path)
    if declared is not None:
        what = f"missing, but {CONFIG_FILE} says that ModelOpt quantized the weights"
        raise CheckpointError(Problem(str(path), what, fix="export with export_hf_checkpoint"))
    return FORMATS["fp16"]


def _modelopt_format(path: Path) -> QuantFormat:
    fields = _read_json(path).get("quantization")
    if not isinstance(fields, dict):
        raise CheckpointError(Problem(str(path), "no mapping called quantization"))
    supported = {fmt.quant_algo: fmt for fmt in FORMATS.values() if fmt.quant_algo is not None}
    algo = fields.get("quant_algo")
    if not isinstance(algo, str) or algo not in supported:
        raise CheckpointError(Problem(str(path), f"quant_algo {algo!r}", SUPPORTED))
    problems = list(_option_problems(str(path), fields))
    if problems:
        raise CheckpointError(problems)
    fmt = supported[algo]
    return fmt if fmt.group_size is None else fmt.with_group_size(fields["group_size"])


def _option_problems(where: str, fields: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if fields.get("kv_cache_quant_algo") is not None:
        what = f"kv_cache_quant_algo {fields['kv_cache_quant_algo']!r}"
        problems.append(Problem(where, what, "null: the KV cache stays float16"))
    if fields.get("has_zero_point"):
        problems.append(Problem(where, "has_zero_point is set", "false: symmetric int4"))
    group_size = fields.get("group_size")
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        problems.append(Problem(where, f"group_size {group_size!r}", allowed))
    excluded = fields.get("exclude_modules")
    names = excluded if isinstance(excluded, list) else [excluded] if excluded else []
    others = [name for name in names if name not in _LEFT_ALONE]
    if others:
        what = f"exclude_modules leaves layers unquantized: {', '.join(map(str, others))}"
        problems.append(Problem(where, what, ", ".join(_LEFT_ALONE)))
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        problem = Problem(str(path), f"cannot be read: {error.strerror}")
        raise CheckpointError(problem) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
