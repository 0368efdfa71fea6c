"""The tensors of one rank: which must be there, and their way into the weights file.

Shapes: N output features, K input features, G int4 group size.
A checkpoint int4 weight is int8 [N/2, K]: byte [i, k] holds row 2i (low nibble) and row 2i+1 (high).
ONNX INT4 [K, N] is packed along N, low nibble first, so its bytes are the plain transpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError, Problem
from pipeline.network.rope import rotary_tables
from pipeline.network.spec import NetworkSpec
from pipeline.network.weights_file import WeightRef, WeightsFile
from pipeline.progress import Progress

_BLOCK_BYTES = 16 * 1024**2

EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
HEAD = "lm_head"


@dataclass(frozen=True)
class Linear:
    """A linear module of the checkpoint: weight [N, K], stored as float16 or as int4."""

    module: str
    num_outputs: int
    num_inputs: int
    quantized: bool
    biased: bool = False

    def required(self, group_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (safetensors dtype, shape) of everything this linear must have."""
        n, k = self.num_outputs, self.num_inputs
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.quantized:
            tensors[f"{self.module}.weight"] = ("I8", (n // 2, k))
            tensors[f"{self.module}.weights_scaling_factor"] = ("F32", (n, k // group_size))
        else:
            tensors[f"{self.module}.weight"] = ("F16", (n, k))
        if self.biased:
            tensors[f"{self.module}.bias"] = ("F16", (n,))
        return tensors

    def optional(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The same for what it may have."""
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{self.module}.bias": ("F16", (self.num_outputs,))
        }
        if self.quantized:
            tensors[f"{self.module}.prequant_scaling_factor"] = ("F16", (self.num_inputs,))
        return tensors


@dataclass(frozen=True)
class LayerModules:
    """Names of one decoder layer. `fc` is the branch that passes the activation (HF gate_proj)."""

    input_norm: str
    qkv: Linear
    dense: Linear
    post_norm: str
    fc: Linear
    gate: Linear
    proj: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of execution."""
        return (self.qkv, self.dense, self.fc, self.gate, self.proj)


@dataclass(frozen=True)
class LinearRef:
    """Where the tensors of one linear lie. `scale` [K/G, N] marks an int4 weight [K, N]; a float16
    weight is [N, K] as in the checkpoint."""

    weight: WeightRef
    scale: WeightRef | None = None
    input_scale: WeightRef | None = None
    bias: WeightRef | None = None


@dataclass
class RankRefs:
    """Everything the graphs point to: vectors and tables by tensor name, linears by module name."""

    tensors: dict[str, WeightRef] = field(default_factory=dict)
    linears: dict[str, LinearRef] = field(default_factory=dict)


def layer_modules(spec: NetworkSpec, layer: int) -> LayerModules:
    """The modules of decoder layer `layer`, counted within the rank."""
    prefix = f"transformer.layers.{layer}"
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    heads_width = spec.num_heads * spec.head_size
    qkv_width = heads_width + 2 * spec.num_kv_heads * spec.head_size

    def linear(name: str, num_outputs: int, num_inputs: int) -> Linear:
        module = f"{prefix}.{name}"
        biased = spec.attention_bias if name.startswith("attention.") else spec.mlp_bias
        return Linear(module, num_outputs, num_inputs, spec.is_quantized(module), biased)

    return LayerModules(
        input_norm=f"{prefix}.input_layernorm.weight",
        qkv=linear("attention.qkv", qkv_width, hidden),
        dense=linear("attention.dense", hidden, heads_width),
        post_norm=f"{prefix}.post_layernorm.weight",
        fc=linear("mlp.fc", ffn, hidden),
        gate=linear("mlp.gate", ffn, hidden),
        proj=linear("mlp.proj", hidden, ffn),
    )


def check_rank(reader: CheckpointReader, spec: NetworkSpec, path: Path) -> None:
    """Compare names, dtypes and shapes with what the network needs; reads only the header.

    Raises:
        CheckpointError: every missing, unused or differing tensor, and every int4 linear whose
            sizes do not divide.
    """
    problems = list(_division_problems(spec, path))
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
    """lm_head; it may have more rows than tokens (padding)."""
    num_rows = _num_token_rows(reader, spec, f"{HEAD}.weight")
    return Linear(HEAD, num_rows, spec.hidden_size, quantized=False)


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
    stored = RankRefs()

    def store_plain(name: str) -> WeightRef:
        stored.tensors[name] = _store_rows(reader, weights_file, name)
        return stored.tensors[name]

    def store_linear(linear: Linear) -> None:
        stored.linears[linear.module] = _store_linear(reader, weights_file, linear)

    progress.start(spec.num_layers + 2, "layers")
    embedding = store_plain(EMBEDDING)
    _store_rotary_tables(weights_file, stored, spec, num_positions)
    progress.advance("embedding")
    for layer in range(spec.num_layers):
        modules = layer_modules(spec, layer)
        store_plain(modules.input_norm)
        store_plain(modules.post_norm)
        for linear in modules.linears:
            store_linear(linear)
        progress.advance(f"layer {layer}")
    store_plain(FINAL_NORM)
    if f"{HEAD}.weight" in reader.tensors:
        store_linear(head_linear(reader, spec))
    else:
        stored.linears[HEAD] = LinearRef(embedding)
    progress.advance("lm_head")
    return stored


def rotary_table_name(part: str, dtype: str) -> str:
    """Name of a rotary table: part "cos" or "sin", dtype "float16" or "float32"."""
    return f"rotary_{part}.{dtype}"


def _expected(
    reader: CheckpointReader, spec: NetworkSpec
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, tuple[str, tuple[int, ...]]]]:
    head = head_linear(reader, spec)
    vector = ("F16", (spec.hidden_size,))
    num_rows = _num_token_rows(reader, spec, EMBEDDING)
    required = {
        EMBEDDING: ("F16", (num_rows, spec.hidden_size)),
        FINAL_NORM: vector,
    }
    optional = head.optional()
    (optional if spec.shared_embedding else required).update(head.required(spec.group_size))
    for layer in range(spec.num_layers):
        modules = layer_modules(spec, layer)
        required |= {modules.input_norm: vector, modules.post_norm: vector}
        for linear in modules.linears:
            required |= linear.required(spec.group_size)
            optional |= linear.optional()
    return required, optional


def _num_token_rows(reader: CheckpointReader, spec: NetworkSpec, name: str) -> int:
    """Rows that a table of the vocabulary must have: its own count, but at least vocab_size."""
    tensor = reader.tensors.get(name)
    has_rows = tensor is not None and len(tensor.shape) == 2
    return max(tensor.shape[0], spec.vocab_size) if tensor and has_rows else spec.vocab_size


def _division_problems(spec: NetworkSpec, path: Path) -> Iterator[Problem]:
    for layer in range(spec.num_layers):
        for linear in layer_modules(spec, layer).linears:
            where = f"{path}: {linear.module}"
            if linear.quantized and linear.num_inputs % spec.group_size:
                yield Problem(
                    where,
                    f"int4 groups of {spec.group_size} do not divide {linear.num_inputs} inputs",
                    fix="quantize with a group size that divides",
                )
            if linear.quantized and linear.num_outputs % 2:
                yield Problem(where, f"{linear.num_outputs} outputs", "an even number for int4")


def _store_linear(reader: CheckpointReader, weights_file: WeightsFile, linear: Linear) -> LinearRef:
    module = linear.module
    bias = _store_optional(reader, weights_file, f"{module}.bias", neutral=0.0)
    if not linear.quantized:
        return LinearRef(_store_rows(reader, weights_file, f"{module}.weight"), bias=bias)
    return LinearRef(
        weight=_store_int4(reader, weights_file, linear),
        scale=_store_scale(reader, weights_file, f"{module}.weights_scaling_factor"),
        input_scale=_store_optional(
            reader, weights_file, f"{module}.prequant_scaling_factor", neutral=1.0
        ),
        bias=bias,
    )


def _store_rows(reader: CheckpointReader, weights_file: WeightsFile, name: str) -> WeightRef:
    blocks = (block for _, block in reader.row_blocks(name, _BLOCK_BYTES))
    return weights_file.add(name, "float16", reader.tensors[name].shape, blocks)


def _store_int4(reader: CheckpointReader, weights_file: WeightsFile, linear: Linear) -> WeightRef:
    name = f"{linear.module}.weight"
    packed = reader.read(name)
    columns = max(1, _BLOCK_BYTES // packed.shape[0])
    blocks = (packed[:, k : k + columns].T for k in range(0, linear.num_inputs, columns))
    return weights_file.add(name, "int4", (linear.num_inputs, linear.num_outputs), blocks)


def _store_scale(reader: CheckpointReader, weights_file: WeightsFile, name: str) -> WeightRef:
    """Rounded to float16 once, here: TensorRT needs it, and the CPU graph reads the same bytes."""
    scale = float16_scale(reader.read(name), f"{reader.tensors[name].file}: {name}").T
    return weights_file.add(name, "float16", scale.shape, [scale])


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
    reader: CheckpointReader, weights_file: WeightsFile, name: str, neutral: float
) -> WeightRef | None:
    """Store a vector unless it is absent or changes nothing (every element is `neutral`)."""
    if name not in reader.tensors:
        return None
    vector = reader.read(name)
    if bool((vector == neutral).all()):
        return None
    return weights_file.add(name, "float16", vector.shape, [vector])


def _store_rotary_tables(
    weights_file: WeightsFile, stored: RankRefs, spec: NetworkSpec, num_positions: int
) -> None:
    tables = rotary_tables(spec.head_size, spec.rotary_base, spec.rotary_scaling, num_positions)
    for part, table in zip(("cos", "sin"), tables, strict=True):
        for dtype in ("float32", "float16"):
            name = rotary_table_name(part, dtype)
            stored.tensors[name] = weights_file.add(name, dtype, table.shape, [table.astype(dtype)])
