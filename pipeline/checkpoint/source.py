"""A Hugging Face checkpoint directory: its raw config, its weight format, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.importers.awq import METHOD as AWQ
from pipeline.checkpoint.importers.awq import awq_layout
from pipeline.checkpoint.importers.fields import LEFT_ALONE
from pipeline.checkpoint.importers.gptq import METHOD as GPTQ
from pipeline.checkpoint.importers.gptq import gptq_layout
from pipeline.checkpoint.importers.repacked import Layout, RepackedReader
from pipeline.checkpoint.layout import planned_sources
from pipeline.checkpoint.pickled import PickledReader, holds_pickles
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.strict_json import parse_object
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ARCHITECTURES, Architecture, ModelShape, shape_from_hf
from pipeline.quant.formats import FORMATS, GROUP_SIZES, QuantFormat

CONFIG_FILE = "config.json"
QUANT_CONFIG_FILE = "hf_quant_config.json"
SUPPORTED = (
    "plain float16/bfloat16/float32 weights, ModelOpt unified int4_awq, w4a8_awq, fp8 and int8_sq, "
    "AutoAWQ gemm, GPTQ"
)
PLAIN_METHOD, MODELOPT = "plain", "modelopt"

# Known by name, and why they stop here.
_RECOGNISED = {
    "FP8_PER_CHANNEL_PER_TOKEN": "one scale per token, which no table describes",
    "NVFP4": "4-bit floats; no engine here has kernels for them. Its header can be shown, not converted",
    "W4A16_NVFP4": "4-bit floats; no engine here has kernels for them. Its header can be shown, "
    "not converted",
    "MIXED_PRECISION": "layers are quantized differently, which no table describes",
}


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
    if declared.format.name not in allowed:
        what = f"{shape.architecture} in {declared.format.name} is not supported"
        raise CheckpointError(Problem(str(directory), what, f"formats {', '.join(allowed)}"))
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
    """Name of the weight format of a Hugging Face checkpoint: "fp16" or "int4_awq".

    Raises:
        CheckpointError: quantized in another way; names what is supported.
    """
    return read_format(source_dir).name


def read_format(source_dir: Path) -> QuantFormat:
    """The weight format of a Hugging Face checkpoint, with its group size. Raises CheckpointError."""
    return read_declared(source_dir).format


def read_declared(source_dir: Path, *, requantize: bool = False) -> Declared:
    """Who quantized a Hugging Face checkpoint, and how; config files only. Raises CheckpointError."""
    declared = read_config(source_dir).get("quantization_config")
    path = source_dir / QUANT_CONFIG_FILE
    where = f"{CONFIG_FILE}: quantization_config"
    if not isinstance(declared, dict | None):
        raise CheckpointError(Problem(where, f"{declared!r}", "null, a mapping"))
    method = MODELOPT if declared is None else declared.get("quant_method")
    if declared is not None and method == AWQ:
        return _foreign(AWQ, awq_layout(declared, where, requantize=requantize))
    if declared is not None and method == GPTQ:
        return _foreign(GPTQ, gptq_layout(declared, where, requantize=requantize))
    if method != MODELOPT:
        what = f"quant_method {method!r} is not supported"
        raise CheckpointError(Problem(where, what, SUPPORTED))
    if path.exists():
        return Declared(MODELOPT, _modelopt_format(path))
    if declared is not None:
        what = f"missing, but {CONFIG_FILE} says that ModelOpt quantized the weights"
        raise CheckpointError(Problem(str(path), what, fix="export with export_hf_checkpoint"))
    return Declared(PLAIN_METHOD, FORMATS["fp16"])


def _foreign(method: str, layout: Layout) -> Declared:
    name = "int4_gptq" if layout.has_zero_points else "int4_awq"
    return Declared(method, FORMATS[name].with_group_size(layout.group_size), layout)


def _modelopt_format(path: Path) -> QuantFormat:
    fields = _read_json(path).get("quantization")
    if not isinstance(fields, dict):
        raise CheckpointError(Problem(str(path), "no mapping called quantization"))
    supported = {fmt.quant_algo: fmt for fmt in FORMATS.values() if fmt.made_by_modelopt}
    algo = fields.get("quant_algo")
    if not isinstance(algo, str) or algo not in supported:
        reason = _RECOGNISED.get(str(algo), "")
        what = f"quant_algo {algo!r}" + (f": {reason}" if reason else "")
        raise CheckpointError(Problem(str(path), what, SUPPORTED))
    fmt = supported[algo]
    problems = list(_option_problems(str(path), fields, fmt))
    if problems:
        raise CheckpointError(problems)
    return fmt if fmt.group_size is None else fmt.with_group_size(fields["group_size"])


def _option_problems(where: str, fields: Mapping[str, Any], fmt: QuantFormat) -> list[Problem]:
    problems = []
    if fields.get("kv_cache_quant_algo") is not None:
        what = f"kv_cache_quant_algo {fields['kv_cache_quant_algo']!r}"
        problems.append(Problem(where, what, "null: the KV cache stays float16"))
    if fields.get("has_zero_point"):
        problems.append(Problem(where, "has_zero_point is set", "false: symmetric int4"))
    group_size = fields.get("group_size")
    if fmt.group_size is not None and (
        isinstance(group_size, bool) or group_size not in GROUP_SIZES
    ):
        allowed = ", ".join(map(str, GROUP_SIZES))
        problems.append(Problem(where, f"group_size {group_size!r}", allowed))
    excluded = fields.get("exclude_modules")
    names = excluded if isinstance(excluded, list) else [excluded] if excluded else []
    others = [name for name in names if name not in LEFT_ALONE]
    if others:
        what = f"exclude_modules leaves layers unquantized: {', '.join(map(str, others))}"
        problems.append(Problem(where, what, ", ".join(LEFT_ALONE)))
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes())
    except OSError as error:
        problem = Problem(str(path), f"cannot be read: {error.strerror}")
        raise CheckpointError(problem) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"not valid JSON: {error}")) from error
