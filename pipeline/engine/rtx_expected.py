"""How each tensor of a rank checkpoint must appear in the weight chunk of a TensorRT-RTX plan.

Made from the checkpoint, not from the exported weights file, so that the export is proved as well.
Observed with TensorRT-RTX 1.7.1: weights keep their values; what varies is the orientation, and the
two float16 products that share an input (gate, fc) may be joined into one matrix.
Shapes: N output features, K input features, G int4 group size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.network.rank_tensors import EMBEDDING, HEAD, float16_scale, layer_modules
from pipeline.network.rope import rotary_tables
from pipeline.network.spec import NetworkSpec

Blocks = Iterator[npt.NDArray[Any]]

_BLOCK_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Form:
    """One way in which tensors may lie in the plan.

    Attributes:
        tensors: names of the checkpoint tensors that are proved when the form is found.
        blocks: makes the bytes anew at each call, as consecutive C-ordered arrays.
    """

    tensors: tuple[str, ...]
    blocks: Callable[[], Blocks]


def expected_forms(reader: CheckpointReader, spec: NetworkSpec, num_positions: int) -> list[Form]:
    """All forms of all tensors; a tensor is proved by any one of its forms.

    Pre-quant scales of ones and biases of zeros are not in the network, so they have no form.
    """
    forms = list(_rotary_forms(spec, num_positions))
    for name, tensor in reader.tensors.items():
        if tensor.dtype == "I8":
            forms.append(Form((name,), partial(_int4_by_output, reader, name)))
            forms.append(Form((name,), partial(_transposed, reader, (name,))))
        elif tensor.dtype == "F32":
            forms += _scale_forms(reader, name)
        elif len(tensor.shape) == 1:
            forms += _vector_forms(reader, name)
        else:
            num_rows = tensor.shape[0]
            if name == f"{HEAD}.weight":
                num_rows = spec.vocab_size
            forms.append(Form((name,), partial(_rows, reader, name, num_rows)))
            if name not in (EMBEDDING, f"{HEAD}.weight"):
                forms.append(Form((name,), partial(_transposed, reader, (name,))))
    return forms + list(_joined_forms(reader, spec))


def _rotary_forms(spec: NetworkSpec, num_positions: int) -> Iterator[Form]:
    tables = rotary_tables(spec.head_size, spec.rotary_base, spec.rotary_scaling, num_positions)
    for name, table in zip(("rotary cos", "rotary sin"), tables, strict=True):
        yield Form((name,), partial(_single, table.astype(np.float16)))


def _scale_forms(reader: CheckpointReader, name: str) -> Iterator[Form]:
    def blocks(transposed: bool) -> Blocks:
        scale = float16_scale(reader.read(name), name)
        yield scale.T if transposed else scale

    for transposed in (False, True):
        yield Form((name,), partial(blocks, transposed))


def _vector_forms(reader: CheckpointReader, name: str) -> Iterator[Form]:
    vector = reader.read(name)
    neutral = {"prequant_scaling_factor": 1.0, "bias": 0.0}.get(name.rpartition(".")[2])
    if neutral is None or not bool((vector == neutral).all()):
        yield Form((name,), partial(_single, vector))


def _joined_forms(reader: CheckpointReader, spec: NetworkSpec) -> Iterator[Form]:
    for layer in range(spec.num_layers):
        modules = layer_modules(spec, layer)
        if not modules.fc.quantized and not modules.gate.quantized:
            names = (f"{modules.gate.module}.weight", f"{modules.fc.module}.weight")
            for order in (names, names[::-1]):
                yield Form(names, partial(_transposed, reader, order))


def _single(array: npt.NDArray[Any]) -> Blocks:
    yield array


def _rows(reader: CheckpointReader, name: str, num_rows: int) -> Blocks:
    """The first rows as they are in the checkpoint."""
    for start, block in reader.row_blocks(name, _BLOCK_BYTES):
        if start < num_rows:
            yield block[: num_rows - start]


def _transposed(reader: CheckpointReader, names: tuple[str, ...]) -> Blocks:
    """[K, N1 + N2 ...]: the matrices [N, K] joined along N and transposed."""
    matrices = [reader.read(name) for name in names]
    row_bytes = sum(matrix.shape[0] * matrix.itemsize for matrix in matrices)
    columns = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, matrices[0].shape[1], columns):
        yield np.concatenate([matrix[:, start : start + columns].T for matrix in matrices], axis=1)


def _int4_by_output(reader: CheckpointReader, name: str) -> Blocks:
    """[N, K/2]: rows of outputs, two inputs per byte, low nibble first.

    The checkpoint has [N/2, K]: byte [i, k] holds output 2i (low nibble) and 2i + 1 (high).
    """
    for _, block in reader.row_blocks(name, _BLOCK_BYTES):
        packed = block.view(np.uint8)
        rows = np.empty((2 * packed.shape[0], packed.shape[1]), np.uint8)
        rows[0::2] = packed & 0x0F
        rows[1::2] = packed >> 4
        yield rows[:, 0::2] | (rows[:, 1::2] << 4)
