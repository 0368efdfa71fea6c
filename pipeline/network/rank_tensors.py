"""The tensors of one rank: which must be there, and their way into the weights file.

Shapes: N output features, K input features, G int4 group size.
A checkpoint int4 weight is int8 [N/2, K]: byte [i, k] holds row 2i (low nibble) and row 2i+1 (high).
ONNX INT4 [K, N] is packed along N, low nibble first, so its bytes are the plain transpose. Weights of
one byte an element are transposed as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError, Problem
from pipeline.network.modules import (
    ACTIVATION_SCALE,
    EMBEDDING,
    HEAD,
    POSITIONS,
    PRE_QUANT_SCALE,
    SCALE,
    ZERO_POINT,
    Linear,
    Tensors,
    final_norm,
    layer_modules,
)
from pipeline.network.rank_facts import RankFacts
from pipeline.network.rope import Rotary, rotary_tables
from pipeline.network.spec import NetworkSpec
from pipeline.network.weights_file import WeightRef, WeightsFile
from pipeline.parallel import Axis
from pipeline.progress import Progress
from pipeline.quant.formats import FORMATS

_BLOCK_BYTES = 16 * 1024**2

ONNX_CODES = {"int4": "int4", "int8": "int8", "fp8": "float8e4m3fn"}
"""ONNX's names of what quantized elements are."""


@dataclass(frozen=True)
class LinearRef:
    """Where the tensors of one linear lie.

    Attributes:
        weight: float16 [N, K] as in the checkpoint, or codes [K, N].
        scale: of codes: float16 [K/G, N] of int4, float32 [N] of int8.
        weight_scale: of codes with one scale for all.
        input_scale: pre-quant scale, float16 [K].
        inputs: dtype and scale to which the input is rounded.
        zero_point: float16 [K/G, N].
    """

    weight: WeightRef
    scale: WeightRef | None = None
    weight_scale: float | None = None
    input_scale: WeightRef | None = None
    inputs: tuple[str, float] | None = None
    bias: WeightRef | None = None
    zero_point: WeightRef | None = None

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.weight.shape[1 if self._has_codes else 0]

    @property
    def _has_codes(self) -> bool:
        return self.weight.dtype not in ("float16", "float32")

    def first_outputs(self, num_outputs: int) -> LinearRef:
        """The linear without its last outputs; codes, which lie as [K, N], can only stay whole."""
        if num_outputs == self.num_outputs:
            return self
        assert not self._has_codes, "_padding_problems refuses this"
        bias = self.bias and self.bias.first_rows(num_outputs)
        return LinearRef(self.weight.first_rows(num_outputs), bias=bias)


@dataclass
class RankRefs:
    """Everything the graphs point to: vectors and tables by tensor name, linears by module name."""

    tensors: dict[str, WeightRef] = field(default_factory=dict)
    linears: dict[str, LinearRef] = field(default_factory=dict)


def check_rank(reader: CheckpointReader, spec: NetworkSpec, path: Path) -> None:
    """Compare names, dtypes and shapes with what the network needs; reads only the header.

    Raises:
        CheckpointError: every missing, unused or differing tensor, and every int4 linear whose
            sizes do not divide.
    """
    problems = [*_division_problems(spec, path), *_padding_problems(reader, spec, path)]
    if problems:
        raise CheckpointError(problems)
    required, optional = _expected(reader, spec)
    for name, tensor in reader.tensors.items():
        expected = required.pop(name, None) or optional.get(name)
        where = f"{path}: {name}"
        if expected is None:
            problems.append(Problem(where, "is not used by the network", fix="remove it"))
        elif (tensor.dtype, tensor.shape) != expected:
            what = f"is {tensor.dtype} {list(tensor.shape)}"
            problems.append(Problem(where, what, f"{expected[0]} {list(expected[1])}"))
    problems += [
        Problem(f"{path}: {name}", "is missing", f"{dtype} {list(shape)}")
        for name, (dtype, shape) in required.items()
    ]
    if problems:
        raise CheckpointError(problems)


def head_linear(reader: CheckpointReader, spec: NetworkSpec) -> Linear:
    """lm_head; it may have more rows than the rank has tokens (padding)."""
    num_rows = _num_token_rows(reader, spec, f"{HEAD}.weight", spec.mapping.tp > 1)
    fmt = spec.format_of(HEAD) if spec.format.is_mixed else FORMATS["fp16"]
    return Linear(HEAD, HEAD, num_rows, spec.hidden_size, fmt)


def store_rank(
    reader: CheckpointReader,
    spec: NetworkSpec,
    weights_file: WeightsFile,
    num_positions: int,
    progress: Progress,
) -> RankRefs:
    """Copy a checked rank into the weights file, tensor by tensor.

    Raises:
        CheckpointError: an int4 scale that float16 cannot hold.
    """
    progress.start(spec.num_rank_layers + spec.has_embedding + spec.has_head, "layers")
    store = _RankStore(reader, spec, weights_file)
    if spec.has_embedding:
        store.embedding()
        progress.advance("embedding")
    if spec.features.rotary is not None:
        _store_rotary_tables(weights_file, store.refs, spec.features.rotary, num_positions)
    for layer, number in enumerate(spec.rank_layers):
        store.layer(layer)
        progress.advance(f"layer {number}")
    if spec.has_head:
        store.head()
        progress.advance("lm_head")
    return store.refs


class _RankStore:
    """Copies the parts of a rank, and notes in `refs` where they lie."""

    def __init__(
        self, reader: CheckpointReader, spec: NetworkSpec, weights_file: WeightsFile
    ) -> None:
        self.refs = RankRefs()
        self._reader = reader
        self._spec = spec
        self._file = weights_file

    def embedding(self) -> None:
        self._plain(EMBEDDING)
        if self._spec.features.learned_positions:
            self._plain(POSITIONS)

    def layer(self, layer: int) -> None:
        modules = layer_modules(self._spec, layer)
        for norm in modules.all_norms:
            for vector in norm.vectors:
                self._plain(vector)
        if modules.router is not None:
            self._plain(modules.router, "float32")
        for linear in modules.linears:
            self._linear(linear)

    def head(self) -> None:
        for vector in final_norm(self._spec).vectors:
            self._plain(vector)
        if f"{HEAD}.weight" in self._reader.tensors:
            self._linear(head_linear(self._reader, self._spec))
        else:
            self.refs.linears[HEAD] = LinearRef(self.refs.tensors[EMBEDDING])

    def _plain(self, name: str, dtype: str = "float16") -> None:
        blocks = (block for _, block in self._reader.row_blocks(name, _BLOCK_BYTES))
        shape = self._reader.tensors[name].shape
        self.refs.tensors[name] = self._file.add(name, dtype, shape, blocks)

    def _linear(self, linear: Linear) -> None:
        self.refs.linears[linear.module] = _store_linear(self._reader, self._file, linear)


def first_row(spec: NetworkSpec, table: WeightRef) -> int:
    """Of a table that is cut over the ranks of a stage, each of which has as many rows."""
    return spec.mapping.tp_rank * table.shape[0]


def rank_facts(spec: NetworkSpec, stored: RankRefs) -> RankFacts:
    """What the rank's graphs say about it."""
    mapping = spec.mapping
    return RankFacts(
        tp=mapping.tp,
        pp=mapping.pp,
        moe_ep=mapping.moe_ep,
        rank=mapping.rank,
        first_layer=spec.rank_layers.start,
        vocab_size=spec.vocab_size,
        first_row=spec.mapping.tp_rank * stored.linears[HEAD].num_outputs if spec.has_head else 0,
    )


def rotary_table_name(part: str, dtype: str) -> str:
    """Name of a rotary table: part "cos" or "sin", dtype "float16" or "float32"."""
    return f"rotary_{part}.{dtype}"


def read_linear(reader: CheckpointReader, linear: Linear, tensor: str) -> npt.NDArray[Any]:
    """One tensor of a linear, such as "weight"; of one expert, its part of the stack."""
    name = f"{linear.source}.{tensor}"
    if linear.expert is None or not linear.is_stacked(tensor):
        return reader.read(name)
    (part,) = reader.read_rows(name, linear.expert, linear.expert + 1)
    return np.asarray(part)


def _expected(reader: CheckpointReader, spec: NetworkSpec) -> tuple[Tensors, Tensors]:
    """Tensors that must be there, tensors that may."""
    required: Tensors = {}
    optional: Tensors = {}
    if spec.has_embedding:
        num_rows = _num_token_rows(reader, spec, EMBEDDING, spec.cut_embedding)
        required[EMBEDDING] = ("F16", (num_rows, spec.hidden_size))
        if spec.features.learned_positions:
            num_positions = spec.table_rows(Axis.POSITION, cut=spec.cut_embedding)
            required[POSITIONS] = ("F16", (num_positions, spec.hidden_size))
    if spec.has_head:
        head = head_linear(reader, spec)
        required |= dict.fromkeys(final_norm(spec).vectors, ("F16", (spec.hidden_size,)))
        optional |= head.optional()
        (optional if spec.shared_embedding else required).update(head.required())
    for layer in range(spec.num_rank_layers):
        modules = layer_modules(spec, layer)
        for norm in modules.all_norms:
            required |= dict.fromkeys(norm.vectors, ("F16", (norm.size,)))
        if modules.router is not None:
            assert spec.features.experts is not None
            required[modules.router] = (
                "F32",
                (spec.features.experts.num_experts, spec.hidden_size),
            )
        for linear in modules.linears:
            required |= linear.required()
            optional |= linear.optional()
    return required, optional


def _num_token_rows(reader: CheckpointReader, spec: NetworkSpec, name: str, cut: bool) -> int:
    """Rows that a table of the vocabulary must have: its own count, but at least what tokens need."""
    needed = spec.table_rows(Axis.VOCAB, cut=cut)
    tensor = reader.tensors.get(name)
    has_rows = tensor is not None and len(tensor.shape) == 2
    return max(tensor.shape[0], needed) if tensor and has_rows else needed


def _division_problems(spec: NetworkSpec, path: Path) -> Iterator[Problem]:
    for layer in range(spec.num_rank_layers):
        for linear in layer_modules(spec, layer).linears:
            where = f"{path}: {linear.module}"
            for what in dict.fromkeys(linear.division_problems()):
                yield Problem(where, what, fix="quantize with another group size or format")


def _padding_problems(reader: CheckpointReader, spec: NetworkSpec, path: Path) -> Iterator[Problem]:
    """Codes of lm_head lie as [K, N], so that rows of padding cannot be left out."""
    if not spec.has_head or spec.mapping.tp > 1:
        return
    head = head_linear(reader, spec)
    if head.quantized and head.num_outputs != spec.vocab_size:
        what = f"has {head.num_outputs} rows, and the model {spec.vocab_size} tokens"
        fix = "convert it again with trtpipe, which pads no vocabulary for one rank"
        yield Problem(f"{path}: {HEAD}.weight", what, "as many rows as tokens", fix)


def _store_linear(reader: CheckpointReader, weights_file: WeightsFile, linear: Linear) -> LinearRef:
    bias = _store_optional(reader, weights_file, linear, "bias", neutral=0.0)
    if not linear.quantized:
        return LinearRef(_store_float16(reader, weights_file, linear), bias=bias)
    per_weight = linear.format.weights == "fp8"
    return LinearRef(
        weight=_store_codes(reader, weights_file, linear),
        scale=None if per_weight else _store_scale(reader, weights_file, linear),
        weight_scale=read_number(reader, linear, SCALE) if per_weight else None,
        input_scale=_store_optional(reader, weights_file, linear, PRE_QUANT_SCALE, neutral=1.0),
        inputs=_read_inputs(reader, linear),
        bias=bias,
        zero_point=_store_zero_point(reader, weights_file, linear),
    )


def read_number(reader: CheckpointReader, linear: Linear, tensor: str) -> float:
    """A scale that is one number.

    Raises:
        CheckpointError: it is not finite or not above 0.
    """
    value = float(read_linear(reader, linear, tensor).reshape(()))
    if not (math.isfinite(value) and value > 0):
        name = f"{linear.source}.{tensor}"
        where = f"{reader.tensors[name].file}: {name}"
        raise CheckpointError(Problem(where, f"scale {value:g}", "finite, above 0"))
    return value


def _read_inputs(reader: CheckpointReader, linear: Linear) -> tuple[str, float] | None:
    if linear.format.inputs is None:
        return None
    return ONNX_CODES[linear.format.inputs], read_number(reader, linear, ACTIVATION_SCALE)


def _store_float16(
    reader: CheckpointReader, weights_file: WeightsFile, linear: Linear
) -> WeightRef:
    """[N, K] as in the checkpoint, in blocks where the tensor is not part of a stack."""
    name = f"{linear.source}.weight"
    blocks: Iterator[npt.NDArray[Any]]
    if linear.expert is None:
        blocks = (block for _, block in reader.row_blocks(name, _BLOCK_BYTES))
    else:
        blocks = iter((read_linear(reader, linear, "weight"),))
    shape = (linear.num_outputs, linear.num_inputs)
    return weights_file.add(f"{linear.module}.weight", "float16", shape, blocks)


def _store_codes(reader: CheckpointReader, weights_file: WeightsFile, linear: Linear) -> WeightRef:
    """[K, N]: for all formats the plain transpose of the checkpoint's bytes."""
    codes = read_linear(reader, linear, "weight").view(np.uint8)
    columns = max(1, _BLOCK_BYTES // codes.shape[0])
    blocks = (codes[:, k : k + columns].T for k in range(0, linear.num_inputs, columns))
    shape = (linear.num_inputs, linear.num_outputs)
    dtype = ONNX_CODES[linear.format.weights]
    return weights_file.add(f"{linear.module}.weight", dtype, shape, blocks)


def _store_scale(reader: CheckpointReader, weights_file: WeightsFile, linear: Linear) -> WeightRef:
    """Those of int4 are rounded to float16 once, here: TensorRT fuses no other, and the CPU graph
    reads the same bytes. Those of int8 stay float32."""
    source = f"{linear.source}.{SCALE}"
    where = f"{reader.tensors[source].file}: {source}"
    scale = read_linear(reader, linear, SCALE)
    name = f"{linear.module}.{SCALE}"
    if linear.format.weights == "int4":
        rounded = float16_scale(scale, where).T
        return weights_file.add(name, "float16", rounded.shape, [rounded])
    if not np.isfinite(scale).all():
        raise CheckpointError(Problem(where, "NaN or infinite scales", "finite"))
    return weights_file.add(name, "float32", scale.shape, [scale])


def _store_zero_point(
    reader: CheckpointReader, weights_file: WeightsFile, linear: Linear
) -> WeightRef | None:
    """As float16, which holds small integers; nothing where all are 0."""
    if not linear.asymmetric:
        return None
    zero = read_linear(reader, linear, ZERO_POINT).T.astype(np.float16)
    if not zero.any():
        return None
    return weights_file.add(f"{linear.module}.{ZERO_POINT}", "float16", zero.shape, [zero])


def float16_scale(scale: npt.NDArray[np.float32], where: str) -> npt.NDArray[np.float16]:
    """float32 scales rounded to float16.

    Too small a scale becomes 0: its whole group is below 5e-7 and adds nothing.

    Raises:
        CheckpointError: not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16)
    if not np.isfinite(rounded).all():
        worst = float(np.max(np.abs(scale)))
        raise CheckpointError(
            Problem(where, f"int4 scale {worst:g}", "finite, at most 65504 (float16)")
        )
    return rounded


def _store_optional(
    reader: CheckpointReader, weights_file: WeightsFile, linear: Linear, tensor: str, neutral: float
) -> WeightRef | None:
    """Store a vector unless it is absent or changes nothing (every element is `neutral`)."""
    if f"{linear.source}.{tensor}" not in reader.tensors:
        return None
    vector = read_linear(reader, linear, tensor)
    if bool((vector == neutral).all()):
        return None
    return weights_file.add(f"{linear.module}.{tensor}", "float16", vector.shape, [vector])


def _store_rotary_tables(
    weights_file: WeightsFile, stored: RankRefs, rotary: Rotary, num_positions: int
) -> None:
    tables = rotary_tables(rotary, num_positions)
    for part, table in zip(("cos", "sin"), tables, strict=True):
        for dtype in ("float32", "float16"):
            name = rotary_table_name(part, dtype)
            stored.tensors[name] = weights_file.add(name, dtype, table.shape, [table.astype(dtype)])
