"""What a checkpoint directory holds, from its config and its headers: no weight is read.

Describes what is there, also when it is of a kind that convert refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.check import check_checkpoint
from pipeline.checkpoint.mapping_sizes import check_ranks, mapping_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.source import (
    QUANT_CONFIG_FILE,
    open_checkpoint,
    open_files,
    read_config,
)
from pipeline.checkpoint.strict_json import parse_object
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import CheckpointError, PipelineError, Problem
from pipeline.models.upstream import upstream_notes

_RANK_FILE = re.compile(r"rank(\d+)\.safetensors")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    Attributes:
        dtype: name in the file, for example "F16".
        file: name of the file that has its data.
        rank: the rank that loads it; None in a Hugging Face checkpoint.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    rank: int | None = None


@dataclass(frozen=True)
class Contents:
    """What a directory holds.

    Attributes:
        kind: "Hugging Face checkpoint", "TensorRT-LLM checkpoint" or "engine".
        architecture: class name, as the config has it.
        quantization: in a few words; "none" for plain weights.
        mapping: sizes by name, "tp" and "pp" at least; empty where nothing is cut.
        tensors: in the order of the files.
        problems: why convert would refuse it; empty for anything but a Hugging Face checkpoint.
        notes: what a reader should know besides, one sentence each.
        files: bytes of the compiled engines, by name; empty for anything but an engine.
    """

    kind: str
    directory: Path
    architecture: str
    quantization: str
    mapping: Mapping[str, int]
    tensors: tuple[TensorEntry, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of all ranks."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def rank_bytes(self) -> dict[int, int]:
        """Bytes of the tensors of each rank; empty where nothing is cut."""
        sums: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.rank is not None:
                sums[tensor.rank] = sums.get(tensor.rank, 0) + tensor.nbytes
        return sums


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in the numbers of their names and in their ranks.

    Attributes:
        pattern: the name, with ranges in place of numbers: `model.layers.{0-79}.mlp.up_proj.weight`.
        count: how many there are, over all ranks.
        nbytes: bytes of one of them.
    """

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int
    ranks: tuple[int, ...]


def describe_hf(directory: Path) -> Contents:
    """A Hugging Face checkpoint, plain or quantized, of any architecture.

    Raises:
        CheckpointError: config or headers are missing or corrupt.
    """
    config = read_config(directory)
    reader = open_files(directory)
    names = config.get("architectures")
    return Contents(
        kind="Hugging Face checkpoint",
        directory=directory,
        architecture=", ".join(map(str, names)) if isinstance(names, list) else "not named",
        quantization=_hf_quantization(directory, config),
        mapping={},
        tensors=tuple(_entries(reader, rank=None)),
        problems=tuple(_why_not_convertible(directory)),
    )


def describe_trtllm(directory: Path) -> Contents:
    """A TensorRT-LLM checkpoint: config.json and one file per rank.

    Raises:
        CheckpointError: config or headers are missing or corrupt, or ranks are missing.
    """
    config = read_config(directory)
    files = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _RANK_FILE.fullmatch(path.name))
    }
    mapping = mapping_of(config)
    check_ranks(directory, mapping, files, "safetensors")
    tensors = tuple(
        entry for rank in sorted(files) for entry in _entries(CheckpointReader(files[rank]), rank)
    )
    return Contents(
        kind="TensorRT-LLM checkpoint",
        directory=directory,
        architecture=str(config.get("architecture", "not named")),
        quantization=trtllm_quantization(config),
        mapping=mapping,
        tensors=tensors,
        notes=(*layout_notes(tensors), *upstream_notes(config)),
    )


def layout_notes(tensors: Iterable[TensorEntry]) -> tuple[str, ...]:
    """What the config alone would make one believe, and is not so."""
    if any(tensor.name.endswith(".weights_zero_point") for tensor in tensors):
        return (
            "int4 with zero points, in this project's own layout under TensorRT-LLM's names: "
            "TensorRT-LLM cannot load it",
        )
    return ()


def trtllm_quantization(config: Mapping[str, Any]) -> str:
    """The `quantization` of a TensorRT-LLM config.json in a few words."""
    fields = config.get("quantization")
    return _algorithm(fields) if isinstance(fields, dict) else "none"


def group_tensors(tensors: Iterable[TensorEntry]) -> list[TensorGroup]:
    """Tensors of equal dtype and shape whose names differ in numbers only, in order of appearance."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorEntry]] = {}
    for tensor in tensors:
        key = (_NUMBER.sub("{}", tensor.name), tensor.dtype, tensor.shape)
        groups.setdefault(key, []).append(tensor)
    return [
        TensorGroup(
            pattern=_pattern([tensor.name for tensor in members]),
            dtype=dtype,
            shape=shape,
            count=len(members),
            nbytes=members[0].nbytes,
            ranks=tuple(sorted({tensor.rank for tensor in members if tensor.rank is not None})),
        )
        for (_, dtype, shape), members in groups.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _pattern(names: Sequence[str]) -> str:
    """The common name, every number replaced by the range of its values."""
    values = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    texts = iter([ranges(column) for column in values])

    def text(_: re.Match[str]) -> str:
        found = next(texts)
        return found if found.isdigit() else f"{{{found}}}"

    return _NUMBER.sub(text, names[0])


def _entries(reader: TensorReader, rank: int | None) -> Iterable[TensorEntry]:
    for tensor in reader.tensors.values():
        yield TensorEntry(
            tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.file.name, rank
        )


def _why_not_convertible(directory: Path) -> list[Problem]:
    try:
        checkpoint = open_checkpoint(directory)
    except PipelineError as error:
        return list(error.problems)
    return check_checkpoint(checkpoint.reader, checkpoint.shape, checkpoint.format)


def _hf_quantization(directory: Path, config: Mapping[str, Any]) -> str:
    """Said by ModelOpt's own file, else by config.json."""
    if (directory / QUANT_CONFIG_FILE).exists():
        return f"ModelOpt {_algorithm(_modelopt_fields(directory / QUANT_CONFIG_FILE))}"
    declared = config.get("quantization_config")
    if declared is None:
        return "none"
    if not isinstance(declared, dict):
        return repr(declared)
    named = declared.get("quant_method", "not named")
    facts = [f"{key} {declared[key]}" for key in ("bits", "group_size") if key in declared]
    return ", ".join([str(named), *facts])


def _algorithm(fields: Mapping[str, Any]) -> str:
    algorithm = fields.get("quant_algo")
    if algorithm is None:
        return "none"
    group_size = fields.get("group_size")
    text = str(algorithm) if group_size is None else f"{algorithm}, groups of {group_size}"
    kv_cache = fields.get("kv_cache_quant_algo")
    return text if kv_cache is None else f"{text}, KV cache {kv_cache}"


def _modelopt_fields(path: Path) -> Mapping[str, Any]:
    try:
        fields = parse_object(path.read_bytes()).get("quantization")
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}")) from error
    if not isinstance(fields, dict):
        raise CheckpointError(Problem(str(path), "no mapping called quantization"))
    return fields
