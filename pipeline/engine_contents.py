"""What an engine directory holds, ours or one of TensorRT-LLM: from its config and graphs alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.checkpoint.describe import (
    Contents,
    TensorEntry,
    layout_notes,
    trtllm_quantization,
)
from pipeline.checkpoint.mapping_sizes import check_ranks, mapping_of
from pipeline.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import onnx

_RANK_FILE: Final = re.compile(r"rank(\d+)\.(onnx|engine)")
_PACKED_BITS: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""ONNX packs these into bytes; numpy has a byte for each."""


def describe_engine(directory: Path, pretrained: dict[str, Any]) -> Contents:
    """An engine directory. The tensors are those of the ONNX networks, if it has any: TensorRT-LLM's own
    engines keep theirs to themselves, so only their files are listed.

    Args:
        pretrained: `pretrained_config` of its config.json.

    Raises:
        CheckpointError: ranks or their weights are missing, or a graph is corrupt.
    """
    mapping = mapping_of(pretrained)
    found: dict[str, dict[int, Path]] = {"onnx": {}, "engine": {}}
    for path in sorted(directory.iterdir()):
        match = _RANK_FILE.fullmatch(path.name)
        if match and path.is_file():
            found[match[2]][int(match[1])] = path
    graphs, engines = found["onnx"], found["engine"]
    opaque = bool(engines) and not graphs
    check_ranks(directory, mapping, engines if opaque else graphs, "engine" if opaque else "onnx")
    tensors = tuple(
        entry for rank in sorted(graphs) for entry in _graph_tensors(graphs[rank], rank)
    )
    notes = (
        ["no rank*.onnx: the tensors are inside the engines, and are not listed"] if opaque else []
    )
    return Contents(
        kind="engine",
        directory=directory,
        architecture=str(pretrained.get("architecture", "not named")),
        quantization=trtllm_quantization(pretrained),
        mapping=mapping,
        tensors=tensors,
        notes=(*notes, *layout_notes(tensors)),
        files={engines[rank].name: engines[rank].stat().st_size for rank in sorted(engines)},
    )


def _graph_tensors(path: Path, rank: int) -> list[TensorEntry]:
    """Weights that an ONNX graph keeps in another file; small constants are part of the graph."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise CheckpointError(Problem(str(path), f"cannot be read: {error}")) from error
    tensors, problems = [], []
    for tensor in graph.initializer:
        if tensor.external_data:
            try:
                tensors.append(_external_tensor(tensor, rank))
            except (KeyError, TypeError, ValueError) as error:
                what = f"its entry for external data cannot be read ({error})"
                problems.append(Problem(f"{path}: {tensor.name!a}", what))
    problems += _missing_weights(path, tensors)
    if problems:
        raise CheckpointError(problems)
    return tensors


def _external_tensor(tensor: onnx.TensorProto, rank: int) -> TensorEntry:
    """Raises KeyError, TypeError or ValueError when the entry makes no sense."""
    import onnx

    external = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims)
    if "length" in external:
        nbytes = int(external["length"])
    else:  # optional in ONNX: as much as the shape takes
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        bits = _PACKED_BITS.get(dtype, 8 * itemsize)
        nbytes = -(-math.prod(shape) * bits // 8)
    return TensorEntry(tensor.name, dtype, shape, nbytes, external["location"], rank)


def _missing_weights(path: Path, tensors: Iterable[TensorEntry]) -> Iterator[Problem]:
    for name in dict.fromkeys(tensor.file for tensor in tensors):
        if not (path.parent / name).is_file():
            yield Problem(str(path), f"its weights are in {name!a}, which is missing")
