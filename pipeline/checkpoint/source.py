"""A Hugging Face checkpoint directory: its raw config, its weight format, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.importers.awq import METHOD as AWQ
from pipeline.checkpoint.importers.awq import awq_layout
from pipeline.checkpoint.importers.gptq import METHOD as GPTQ
from pipeline.checkpoint.importers.gptq import gptq_layout
from pipeline.checkpoint.importers.modelopt import METHOD as MODELOPT
from pipeline.checkpoint.importers.modelopt import fields_of_config, modelopt_format
from pipeline.checkpoint.importers.repacked import Layout, RepackedReader
from pipeline.checkpoint.layout import planned_sources, split_problems
from pipeline.checkpoint.pickled import PickledReader, holds_pickles
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.strict_json import parse_object
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES, Architecture, ModelShape, shape_from_hf
from pipeline.models.plain_modules import plain_modules
from pipeline.quant.formats import FORMATS, QuantFormat

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
_QUANTIZATION = f"{CONFIG_FILE}: quantization_config"
SUPPORTED = (
    "plain float16/bfloat16/float32 weights, ModelOpt unified int4_awq, w4a8_awq, fp8, int8_sq, "
    "int8_wo and mixed, AutoAWQ gemm, GPTQ"
)
PLAIN_METHOD = "plain"


@dataclass(frozen=True)
class HfCheckpoint:
    """What a directory holds; weights are not read yet.

    Attributes:
        config: raw config.json.
        method: who quantized the weights: "plain" (nobody), "modelopt", "awq" (AutoAWQ) or "gptq".
        format: what convert makes of the decoder's linears.
        reader: presents the tensors that `format` reads, whatever the files call them.
    """

    directory: Path
    config: dict[str, Any]
    shape: ModelShape
    format: QuantFormat
    reader: TensorReader
    method: str = PLAIN_METHOD


@dataclass(frozen=True)
class Declared:
    """What a directory says of its weights; no tensor has been looked at.

    Attributes:
        layout: how foreign int4 linears are stored; None when the tensors are read as they are.
    """

    method: str
    format: QuantFormat
    layout: Layout | None = None


def open_checkpoint(directory: Path, *, requantize: bool = False) -> HfCheckpoint:
    """Opens a Hugging Face checkpoint: config and headers only.

    Args:
        requantize: round asymmetric int4 to symmetric int4, which loses a little. Otherwise it is
            kept exactly, with its zero points.

    Raises:
        CheckpointError: config or headers are missing, corrupt or not supported.
    """
    config = read_config(directory)
    declared = read_declared(directory, requantize=requantize)
    shape = shape_from_hf(config)
    allowed = ARCHITECTURES[shape.architecture].formats
    unknown = [one.name for one in declared.format.parts if one.name not in allowed]
    if unknown:
        what = f"{shape.architecture} in {unknown[0]} is not supported"
        raise CheckpointError(Problem(str(directory), what, f"formats {', '.join(allowed)}"))
    split = split_problems(shape, declared.format)
    if split:
        raise CheckpointError(split)
    files = open_files(directory)
    add_base_prefix(files, ARCHITECTURES[shape.architecture])
    reader: TensorReader = files
    if declared.layout is not None:
        repacked = RepackedReader(files, declared.layout)
        wanted = {source.name for source in planned_sources(shape, declared.format)}
        repacked.drop_zero_biases(wanted)
        reader = repacked
    return HfCheckpoint(
        directory=directory,
        config=config,
        shape=shape,
        format=declared.format,
        reader=reader,
        method=declared.method,
    )


def add_base_prefix(reader: CheckpointReader | PickledReader, architecture: Architecture) -> None:
    """Completes the names of a file that was saved from the bare decoder, as OpenAI's GPT-2 was."""
    prefix = architecture.base_prefix
    if not prefix or any(name.startswith(prefix) for name in reader.tensors):
        return
    reader.tensors = {
        name: replace(tensor, name=name)
        for short, tensor in reader.tensors.items()
        for name in [short if short.startswith("lm_head.") else prefix + short]
    }


def open_files(directory: Path) -> CheckpointReader | PickledReader:
    """The weight files as they are, safetensors or PyTorch's own; headers only.

    Raises:
        CheckpointError: nothing there, or every way in which files, headers and index are wrong.
    """
    if holds_pickles(directory):
        return PickledReader(directory)
    return CheckpointReader(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """The raw config.json. Raises CheckpointError."""
    return _read_json(directory / CONFIG_FILE)


def detect_format(source_dir: Path) -> str:
    """Name of the weight format of a Hugging Face checkpoint: a key of FORMATS.

    Raises:
        CheckpointError: quantized in another way; names what is supported.
    """
    return read_format(source_dir).name


def read_format(source_dir: Path) -> QuantFormat:
    """The weight format of a Hugging Face checkpoint, with its group size. Raises CheckpointError."""
    return read_declared(source_dir).format


def read_declared(source_dir: Path, *, requantize: bool = False) -> Declared:
    """Who quantized a Hugging Face checkpoint, and how; config files only. Raises CheckpointError."""
    config, path = read_config(source_dir), source_dir / QUANT_CONFIG_FILE
    declared = _quantization_config(config)
    if declared is not None and declared.get("quant_method") != MODELOPT:
        return _by_others(declared, config, requantize=requantize)
    if path.exists():
        return Declared(MODELOPT, _modelopt_format(path, config))
    if declared is not None:
        what = f"missing, but {CONFIG_FILE} says that ModelOpt quantized the weights"
        raise CheckpointError(Problem(str(path), what, fix="export with export_hf_checkpoint"))
    return Declared(PLAIN_METHOD, FORMATS["fp16"])


def declared_in(config: Mapping[str, Any], *, requantize: bool = False) -> Declared:
    """What a config.json alone says, of a model whose files are not here. Raises CheckpointError."""
    declared = _quantization_config(config)
    if declared is None:
        return Declared(PLAIN_METHOD, FORMATS["fp16"])
    if declared.get("quant_method") != MODELOPT:
        return _by_others(declared, config, requantize=requantize)
    fields = fields_of_config(declared)
    return Declared(MODELOPT, modelopt_format(fields, config, _QUANTIZATION, SUPPORTED))


def _quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    declared = config.get("quantization_config")
    if not isinstance(declared, dict | None):
        raise CheckpointError(Problem(_QUANTIZATION, f"{declared!r}", "null, a mapping"))
    return declared


def _by_others(
    declared: dict[str, Any], config: Mapping[str, Any], *, requantize: bool
) -> Declared:
    method = declared.get("quant_method")
    if method == AWQ:
        plain = plain_modules(config)
        return _foreign(AWQ, awq_layout(declared, _QUANTIZATION, plain, requantize=requantize))
    if method == GPTQ:
        return _foreign(GPTQ, gptq_layout(declared, _QUANTIZATION, requantize=requantize))
    what = f"quant_method {method!r} is not supported"
    raise CheckpointError(Problem(_QUANTIZATION, what, SUPPORTED))


def _foreign(method: str, layout: Layout) -> Declared:
    name = "int4_gptq" if layout.has_zero_points else "int4_awq"
    return Declared(method, FORMATS[name].with_group_size(layout.group_size), layout)


def _modelopt_format(path: Path, config: Mapping[str, Any]) -> QuantFormat:
    fields = _read_json(path).get("quantization")
    if not isinstance(fields, dict):
        raise CheckpointError(Problem(str(path), "no mapping called quantization"))
    return modelopt_format(fields, config, str(path), SUPPORTED)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        problem = Problem(str(path), f"cannot be read: {error.strerror}")
        raise CheckpointError(problem) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
