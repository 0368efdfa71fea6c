"""`show`: what a directory is, whichever of the public formats it is in, as a page or as JSON."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.describe import (
    Contents,
    TensorEntry,
    describe_hf,
    describe_trtllm,
    group_tensors,
    ranges,
)
from pipeline.checkpoint.mapping_sizes import mapping_text
from pipeline.checkpoint.source import CONFIG_FILE, read_config
from pipeline.checkpoint.strict_json import parse_object
from pipeline.engine_contents import describe_engine
from pipeline.errors import CheckpointError, Problem
from pipeline.forecast.sizes_text import exact_text
from pipeline.links import circle_problem

_SHOWN_PROBLEMS = 8
_KINDS = (
    "a Hugging Face checkpoint (config.json with `architectures`), a TensorRT-LLM checkpoint "
    "(config.json with `mapping`, rank0.safetensors) or an engine directory (config.json with "
    "`pretrained_config`, rank0.onnx or rank0.engine)"
)


def describe(directory: Path) -> Contents:
    """The contents of a checkpoint or engine directory; no weight is read.

    Raises:
        CheckpointError: it is none of the three kinds, or its files are missing or corrupt.
    """
    circle = circle_problem(directory / CONFIG_FILE)
    if circle is not None:
        raise CheckpointError(circle)
    if not (directory / CONFIG_FILE).exists():
        raise CheckpointError(Problem(str(directory), f"no {CONFIG_FILE}", _KINDS))
    config = read_config(directory)
    if isinstance(config.get("pretrained_config"), dict):
        return describe_engine(directory, config["pretrained_config"])
    if "mapping" in config and "architecture" in config:
        return describe_trtllm(directory)
    if "architectures" in config or "model_type" in config:
        return describe_hf(directory)
    what = f"its {CONFIG_FILE} is of no kind that is known here"
    raise CheckpointError(Problem(str(directory), what, _KINDS))


def contents_json(contents: Contents) -> dict[str, Any]:
    """Everything as plain data, every tensor by itself; sizes in bytes."""
    return {
        "kind": contents.kind,
        "directory": str(contents.directory),
        "architecture": contents.architecture,
        "quantization": contents.quantization,
        "mapping": dict(contents.mapping),
        "total_bytes": contents.total_bytes,
        "rank_bytes": {str(rank): size for rank, size in contents.rank_bytes().items()},
        "tensors": [_tensor_json(tensor) for tensor in contents.tensors],
        "files": dict(contents.files),
        "notes": list(contents.notes),
        "problems": [vars(problem) for problem in contents.problems],
    }


def _tensor_json(tensor: TensorEntry) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "file": tensor.file,
        "rank": tensor.rank,
    }


def contents_text(contents: Contents) -> str:
    """A page: what it is, its tensors with equal layers in one line, bytes of every rank.

    Lines are never folded, so that `| grep` finds whole names.
    """
    facts = [contents.architecture, f"quantization: {contents.quantization}"]
    if contents.mapping:
        facts.append(mapping_text(contents.mapping))
    lines = [f"{contents.kind} in {contents.directory}", "; ".join(facts)]
    lines += [f"note: {note}" for note in contents.notes]
    lines.append("")
    if contents.tensors:
        lines += [*_aligned(_rows(contents), right=(2, 3, 4)), ""]
    lines += [f"rank {rank}: {exact_text(size)}" for rank, size in contents.rank_bytes().items()]
    lines += [f"{name}: {exact_text(size)}" for name, size in contents.files.items()]
    if contents.tensors or not contents.files:
        number, total = len(contents.tensors), contents.total_bytes
        lines.append(f"total: {number} tensors, {exact_text(total)} ({total} bytes)")
    if contents.problems:
        lines.append("convert would refuse it:")
    lines += [f"  {problem}" for problem in contents.problems[:_SHOWN_PROBLEMS]]
    if len(contents.problems) > _SHOWN_PROBLEMS:
        lines.append(f"  and {len(contents.problems) - _SHOWN_PROBLEMS} more (--json has all)")
    return "\n".join(lines)


def _rows(contents: Contents) -> list[list[str]]:
    rows = [["tensor", "dtype", "shape", "number", "bytes", "ranks" if contents.mapping else ""]]
    for group in group_tensors(contents.tensors):
        shape = " x ".join(map(str, group.shape)) or "scalar"
        size = exact_text(group.count * group.nbytes)
        ranks = ranges(group.ranks)
        rows.append([group.pattern, group.dtype, shape, str(group.count), size, ranks])
    return rows


def _aligned(rows: Sequence[Sequence[str]], right: Container[int]) -> list[str]:
    """Columns of equal width, those in `right` flushed right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def is_published(directory: Path) -> bool:
    """Whether it carries a publisher's manifest; artifacts of the store have one of another kind."""
    try:
        return "action" not in parse_object((directory / "manifest.json").read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # damaged: whoever reads it next says so
        return True
