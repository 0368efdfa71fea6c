"""Finished layers and the tensors around them as one Hugging Face checkpoint.

Up to `SINGLE_FILE_BYTES` it is one file. Above, every layer's file becomes a shard under a new name (a
hard link: nothing is written twice) and the tensors outside the layers are copied block by block.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.layout import planned_sources
from pipeline.checkpoint.reader import INDEX_FILE, SINGLE_FILE, CheckpointReader, TensorInfo
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.checkpoint.writer import SafetensorsWriter, TensorSpec
from pipeline.errors import CheckpointError, Problem
from pipeline.models import ModelShape
from pipeline.quant.formats import QuantFormat
from pipeline.quant.layers.skeleton import as_torch
from pipeline.store import write_json

SINGLE_FILE_BYTES = 2_000_000_000
METADATA = {"format": "pt"}
"""transformers refuses a file without it."""

_DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file.

    Raises:
        StageError: no room on the disk.
    """
    specs = [
        TensorSpec(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    with SafetensorsWriter(path, specs, METADATA) as writer:
        for spec in specs:
            values = tensors[spec.name].detach().to("cpu").contiguous()
            raw = values.reshape(-1).view(torch.uint8).numpy()
            writer.write(spec.name, raw.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape))


def write_shards(
    out_dir: Path,
    outer: TensorReader,
    outer_names: Sequence[str],
    layer_files: Sequence[Path],
    ones: Sequence[TensorSpec] = (),
) -> None:
    """Write the weights of `out_dir`.

    Args:
        outer: has the tensors outside the layers; `outer_names` are taken over unchanged.
        layer_files: one for each layer.
        ones: tensors of ones to add.

    Raises:
        CheckpointError: tensors that are not finite.
        StageError: no room on the disk.
    """
    layers = [CheckpointReader(path) for path in layer_files]
    outer_bytes = sum(outer.tensors[name].nbytes for name in outer_names)
    layer_bytes = sum(info.nbytes for layer in layers for info in layer.tensors.values())
    if outer_bytes + layer_bytes <= SINGLE_FILE_BYTES:
        sources = dict.fromkeys(outer_names, outer)
        sources |= {name: layer for layer in layers for name in layer.tensors}
        _copy(out_dir / SINGLE_FILE, sources, frozenset(outer_names), ones)
        return
    count = 1 + len(layers)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    _copy(out_dir / names[0], dict.fromkeys(outer_names, outer), frozenset(outer_names), ones)
    weight_map = dict.fromkeys([*outer_names, *(spec.name for spec in ones)], names[0])
    for shard, path, layer in zip(names[1:], layer_files, layers, strict=True):
        _link(path, out_dir / shard)
        weight_map |= dict.fromkeys(layer.tensors, shard)
    total = outer_bytes + layer_bytes + sum(spec.nbytes for spec in ones)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out_dir / INDEX_FILE, index)


def missing_ones(
    layer_files: Sequence[Path], shape: ModelShape, fmt: QuantFormat
) -> list[TensorSpec]:
    """Pre-quant scales that linears of some layers have and their like in others do not.

    Where a search found no scale worth having there is none; but a checkpoint holds such a tensor for
    all linears of a kind or for none, so that a lost one is noticed. One is what its absence means.
    """
    found = {name: info for path in layer_files for name, info in _infos(path).items()}
    optional = [source for source in planned_sources(shape, fmt) if not source.required]
    dtypes = {source.kind: found[source.name].dtype for source in optional if source.name in found}
    missing = {
        source.name: TensorSpec(source.name, dtypes[source.kind], source.shape)
        for source in optional
        if source.name not in found and source.kind in dtypes
    }
    return list(missing.values())


def _infos(path: Path) -> Mapping[str, TensorInfo]:
    return CheckpointReader(path).tensors


def _link(path: Path, destination: Path) -> None:
    try:
        os.link(path, destination)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, destination)


def _copy(
    path: Path,
    sources: Mapping[str, TensorReader],
    checked: frozenset[str],
    ones: Sequence[TensorSpec],
) -> None:
    problems: list[Problem] = []
    with SafetensorsWriter(path, [*_specs(sources), *ones], METADATA) as writer:
        for spec in ones:
            writer.write(spec.name, np.ones(spec.shape, NUMPY_DTYPES[spec.dtype]))
        for name, reader in sources.items():
            is_finite = True
            for first, rows in reader.row_blocks(name) if reader.tensors[name].shape else ():
                writer.write_rows(name, first, rows)
                is_finite &= name not in checked or _is_finite(rows)
            if not reader.tensors[name].shape:
                writer.write(name, reader.read(name))
            if not is_finite:
                problems.append(Problem(name, "holds values that are not finite"))
        if problems:
            raise CheckpointError(problems)


def _is_finite(values: Any) -> bool:
    return bool(torch.isfinite(as_torch(values)).all())


def _specs(sources: Mapping[str, TensorReader]) -> Iterator[TensorSpec]:
    for name, reader in sources.items():
        info = reader.tensors[name]
        yield TensorSpec(name, info.dtype, info.shape)
