"""How each tensor of a rank checkpoint must appear in the weight chunk of a TensorRT-RTX plan.

Made from the checkpoint, not from the exported weights file, so that the export is proved as well.
Observed with TensorRT-RTX 1.7.1: weights keep their values; what varies is the orientation, and
float16 and fp8 products that share an input (such as gate and fc) may be joined into one matrix.
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
from pipeline.models.decoder import Residual
from pipeline.network.modules import (
    ACTIVATION_SCALE,
    HEAD,
    PRE_QUANT_SCALE,
    SCALE,
    ZERO_POINT,
    LayerModules,
    Linear,
    layer_modules,
)
from pipeline.network.rank_tensors import float16_scale, head_linear, read_linear
from pipeline.network.rope import rotary_tables
from pipeline.network.spec import NetworkSpec
from pipeline.network.zero_points import rounded_products

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

    Pre-quant scales of ones and biases of zeros are not in the network, so they have no form. Neither
    have scales that are one number: four bytes prove nothing. The
    tensors of one expert of a stack are proved one by one, as "<tensor of the stack>[<expert>]".
    """
    forms = list(_rotary_forms(spec, num_positions))
    of_linears: set[str] = set()
    for layer in range(spec.num_rank_layers):
        modules = layer_modules(spec, layer)
        for linear in modules.linears:
            of_linears |= linear.required().keys() | linear.optional().keys()
            forms += _linear_forms(reader, linear)
        forms += _joined_forms(reader, modules, spec.features.residual)
        forms += _rounding_forms(reader, modules, spec.features.residual)
    if spec.has_head and f"{HEAD}.weight" in reader.tensors:
        head = head_linear(reader, spec)
        if head.quantized:
            of_linears |= head.required().keys() | head.optional().keys()
            forms += _linear_forms(reader, head)
    for name, tensor in reader.tensors.items():
        if name in of_linears:
            continue
        is_cut = name == f"{HEAD}.weight" and spec.mapping.tp == 1
        num_rows = spec.vocab_size if is_cut else tensor.shape[0]
        if len(tensor.shape) > 1 or not _is_neutral(name, reader.read(name)):
            forms.append(Form((name,), partial(_rows, reader, name, num_rows)))
        if name.endswith(".router.weight"):
            forms.append(Form((name,), partial(_single, reader.read(name).T)))
    return forms


def _rotary_forms(spec: NetworkSpec, num_positions: int) -> Iterator[Form]:
    if spec.features.rotary is None:
        return
    tables = rotary_tables(spec.features.rotary, num_positions)
    for name, table in zip(("rotary cos", "rotary sin"), tables, strict=True):
        yield Form((name,), partial(_single, table.astype(np.float16)))


def _linear_forms(reader: CheckpointReader, linear: Linear) -> Iterator[Form]:
    name = _label(linear, "weight")
    if linear.format.weights == "int4":
        yield Form((name,), partial(_int4_by_output, reader, linear))
        yield from _scale_forms(reader, linear)
        if linear.asymmetric:
            yield from _zero_point_forms(reader, linear)
    else:
        yield Form((name,), partial(_plain, reader, linear))
    if linear.format.weights == "int8":
        yield from _int8_scale_forms(reader, linear)
    yield Form((name,), partial(_transposed, reader, (linear,)))
    for tensor in ("bias", "prequant_scaling_factor"):
        if f"{linear.source}.{tensor}" in reader.tensors:
            vector = read_linear(reader, linear, tensor)
            if not _is_neutral(tensor, vector):
                yield Form((_label(linear, tensor),), partial(_single, vector))


def _label(linear: Linear, tensor: str) -> str:
    part = "" if linear.expert is None else f"[{linear.expert}]"
    return f"{linear.source}.{tensor}{part}"


def _scale_forms(reader: CheckpointReader, linear: Linear) -> Iterator[Form]:
    name = _label(linear, "weights_scaling_factor")

    def blocks(transposed: bool) -> Blocks:
        scale = float16_scale(read_linear(reader, linear, "weights_scaling_factor"), name)
        yield scale.T if transposed else scale

    for transposed in (False, True):
        yield Form((name,), partial(blocks, transposed))


def _int8_scale_forms(reader: CheckpointReader, linear: Linear) -> Iterator[Form]:
    """Constants are folded: beside a rounded input lies the product of its scale with the weight's."""
    scale_N = read_linear(reader, linear, SCALE)
    if linear.format.inputs is not None:
        scale_N = scale_N * read_linear(reader, linear, ACTIVATION_SCALE).reshape(())
    yield Form((_label(linear, SCALE),), partial(_single, scale_N))


def _rounding_forms(
    reader: CheckpointReader, modules: LayerModules, residual: Residual
) -> Iterator[Form]:
    """Before an input is rounded lies one vector, in which norm, pre-quant scale and the scale of the
    rounding are folded: 1 / ((scale / pre_quant_scale) / norm), each step rounded to float32."""
    before = [(modules.qkv, residual.before_attention), (modules.dense, None)]
    for mlp in modules.mlps:
        before += [(mlp.fc, residual.before_mlp), (mlp.proj, None)]
        before += [(mlp.gate, residual.before_mlp)] if mlp.gate is not None else []
    for linear, norm in before:
        if linear.format.inputs is None:
            continue
        scale = read_linear(reader, linear, ACTIVATION_SCALE).astype(np.float32)
        names = []
        if f"{linear.source}.{PRE_QUANT_SCALE}" in reader.tensors:
            vector = read_linear(reader, linear, PRE_QUANT_SCALE)
            if not _is_neutral(PRE_QUANT_SCALE, vector):
                scale = scale / vector.astype(np.float32)
                names.append(_label(linear, PRE_QUANT_SCALE))
        yield from _folded(names, scale)
        if norm is not None:
            weight = modules.norms[norm].weight
            names.append(weight)
            yield from _folded(names, scale / reader.read(weight).astype(np.float32))


def _folded(names: list[str], divisor: npt.NDArray[np.float32]) -> Iterator[Form]:
    if names:
        yield Form(tuple(names), partial(_single, np.float32(1) / divisor))


def _zero_point_forms(reader: CheckpointReader, linear: Linear) -> Iterator[Form]:
    """Constants are folded: what lies in the plan is zero_point * scale [G, N], rounded to float16.

    Each group is proved by itself: the compiler changes their order, and joins products that share an
    input (gate, fc) behind each other. Where every zero point is 0 there is no correction.
    """
    name = _label(linear, ZERO_POINT)
    zero_NG = read_linear(reader, linear, ZERO_POINT)

    def blocks(group: int) -> Blocks:
        scale_NG = float16_scale(read_linear(reader, linear, "weights_scaling_factor"), name)
        yield rounded_products(zero_NG[:, group : group + 1], scale_NG[:, group : group + 1])

    if zero_NG.any():
        for group in range(zero_NG.shape[1]):
            yield Form((f"{name}, group {group}",), partial(blocks, group))


def _is_neutral(name: str, vector: npt.NDArray[Any]) -> bool:
    neutral = {"prequant_scaling_factor": 1.0, "bias": 0.0}.get(name.rpartition(".")[2])
    return neutral is not None and bool((vector == neutral).all())


def _joined_forms(
    reader: CheckpointReader, modules: LayerModules, residual: Residual
) -> Iterator[Form]:
    """Products of one kind that share an input, all in one matrix, in either order."""
    sharing = [
        linear for mlp in modules.mlps for linear in (mlp.fc, mlp.gate) if linear is not None
    ]
    if residual.before_mlp == residual.before_attention:
        sharing.insert(0, modules.qkv)
    for kind in ("fp16", "int8", "fp8"):
        alike = tuple(linear for linear in sharing if linear.format.weights == kind)
        for order in (alike, alike[::-1]) if len(alike) > 1 else ():
            names = tuple(_label(linear, "weight") for linear in order)
            yield Form(names, partial(_transposed, reader, order))


def _single(array: npt.NDArray[Any]) -> Blocks:
    yield array


def _rows(reader: CheckpointReader, name: str, num_rows: int) -> Blocks:
    """The first rows as they are in the checkpoint."""
    for start, block in reader.row_blocks(name, _BLOCK_BYTES):
        if start < num_rows:
            yield block[: num_rows - start]


def _plain(reader: CheckpointReader, linear: Linear) -> Blocks:
    """[N, K] as in the checkpoint."""
    if linear.expert is not None:
        yield _as_bytes(read_linear(reader, linear, "weight"))
        return
    for _, block in reader.row_blocks(f"{linear.source}.weight", _BLOCK_BYTES):
        yield _as_bytes(block)


def _as_bytes(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """numpy has no buffers of fp8."""
    return values.view(np.uint8) if values.itemsize == 1 else values


def _transposed(reader: CheckpointReader, linears: tuple[Linear, ...]) -> Blocks:
    """[K, N1 + N2 ...]: the matrices [N, K] joined along N and transposed."""
    matrices = [_as_bytes(read_linear(reader, linear, "weight")) for linear in linears]
    row_bytes = sum(matrix.shape[0] * matrix.itemsize for matrix in matrices)
    columns = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, matrices[0].shape[1], columns):
        yield np.concatenate([matrix[:, start : start + columns].T for matrix in matrices], axis=1)


def _int4_by_output(reader: CheckpointReader, linear: Linear) -> Blocks:
    """[N, K/2]: rows of outputs, two inputs per byte, low nibble first.

    The checkpoint has [N/2, K]: byte [i, k] holds output 2i (low nibble) and 2i + 1 (high).
    """
    for block in _plain(reader, linear):
        packed = block.view(np.uint8)
        rows = np.empty((2 * packed.shape[0], packed.shape[1]), np.uint8)
        rows[0::2] = packed & 0x0F
        rows[1::2] = packed >> 4
        yield rows[:, 0::2] | (rows[:, 1::2] << 4)
