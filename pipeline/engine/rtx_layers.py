"""What the compiler made of the network, read from its layer listing.

The listing (VERBOSE log, DETAILED verbosity) is what the engine inspector would show on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import GateError, Problem
from pipeline.network.collectives import all_reduce_names
from pipeline.network.io_names import KV_LENGTHS, LOGITS, cache_names
from pipeline.network.modules import HEAD, Linear, layer_modules
from pipeline.network.spec import NetworkSpec

_LAYER = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: .*?"
    r"Metadata: (?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>\S+), Dimensions: \[[^\]]*\].*?Datatype: (?P<dtype>\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
END_OF_LAYERS = "I/O Tensors:"

_FUSED_ATTENTION = "_gemm_mha_v2"
_ALL_REDUCE = "comm_allreduce"
_COLLECTIVE = "comm_"
_MATRIX_PRODUCTS = ("runtime_fusion", "gemm")
_DTYPES = {"int4": "Int4", "int8": "Int8", "fp8": "FP8"}


@dataclass(frozen=True)
class CompiledLayer:
    """One line of the listing.

    Attributes:
        kind: the compiler's word, such as "runtime_fusion", "gemm", "kgen", "copy".
        inputs, outputs: names of tensors.
        constant_dtypes: the compiler's words, such as "Half", "Int4".
        nodes: names of the ONNX nodes it came from.
        input_dtypes: the compiler's words.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constant_dtypes: tuple[str, ...]
    nodes: tuple[str, ...]
    input_dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerCounts:
    """What check_layers found; see BuildFacts."""

    num_fused_quantized: int
    num_unfused_quantized: int
    num_fused_attention: int
    num_all_reduces: int


def check_layers(listing: str, spec: NetworkSpec, where: str) -> LayerCounts:
    """Check that the products and attentions of every layer are fused, the cache stays in place, and
    each sum over ranks is one collective.

    Args:
        listing: text of the listing.
        where: the log it came from, for errors.

    Raises:
        GateError: everything that is not as it should be.
    """
    layers = parse_listing(listing, where)
    linears = [
        linear
        for layer in range(spec.num_rank_layers)
        for linear in layer_modules(spec, layer).linears
    ]
    linears += _coded_head(spec)
    can_fuse = [linear for linear in linears if _can_fuse(linear)]
    # With a soft cap attention is made of single products; TensorRT has no kernel for it.
    can_fuse_attention = spec.features.attention_softcap is None
    problems = [
        Problem(where, problem)
        for problem in (
            *_product_problems(layers, linears, can_fuse),
            *_attention_problems(layers, spec.num_rank_layers if can_fuse_attention else 0),
            *_cache_problems(layers, spec.num_rank_layers),
            *_sum_problems(layers, all_reduce_names(spec)),
        )
    ]
    if problems:
        raise GateError(problems)
    num_quantized = sum(linear.quantized for linear in linears)
    return LayerCounts(
        num_fused_quantized=len(can_fuse),
        num_unfused_quantized=num_quantized - len(can_fuse),
        num_fused_attention=spec.num_rank_layers if can_fuse_attention else 0,
        num_all_reduces=len(all_reduce_names(spec)),
    )


def parse_listing(listing: str, where: str) -> list[CompiledLayer]:
    """The layers of a listing.

    Raises:
        GateError: no listing, or a line in a form that is not known.
    """
    text = listing.partition(END_OF_LAYERS)[0]
    lines = [line for line in text.splitlines() if line.startswith("Name: ")]
    matches = [_LAYER.match(line) for line in lines]
    if not lines or None in matches:
        what = "the layer listing has a form that is not known" if lines else "no layer listing"
        fix = "the compiler of this TensorRT-RTX version differs: use 1.7.1"
        raise GateError(Problem(where, what, fix=fix))
    return [
        CompiledLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=tuple(_names(match["inputs"])),
            outputs=tuple(_names(match["outputs"])),
            constant_dtypes=tuple(
                tensor["dtype"] for tensor in _TENSOR.finditer(match["constants"])
            ),
            nodes=tuple(_ONNX_NODE.findall(match["metadata"])),
            input_dtypes=tuple(tensor["dtype"] for tensor in _TENSOR.finditer(match["inputs"])),
        )
        for match in matches
        if match is not None
    ]


def _names(tensors: str) -> Iterator[str]:
    return (tensor["name"] for tensor in _TENSOR.finditer(tensors))


def _coded_head(spec: NetworkSpec) -> list[Linear]:
    """lm_head, under the name of its product, where it is quantized; a plain one is not checked."""
    fmt = spec.format_of(HEAD)
    if not (spec.has_head and spec.format.is_mixed and fmt.quant_algo is not None):
        return []
    return [Linear(f"{LOGITS}.float16", HEAD, spec.vocab_size, spec.hidden_size, fmt)]


def _can_fuse(linear: Linear) -> bool:
    """With one group per column the int4 scale is per channel, which TensorRT-RTX never fuses."""
    group_size = linear.format.group_size
    return linear.quantized and (group_size is None or linear.num_inputs > group_size)


def _product_problems(
    layers: list[CompiledLayer], linears: list[Linear], can_fuse: list[Linear]
) -> Iterator[str]:
    products = [layer for layer in layers if layer.kind in _MATRIX_PRODUCTS]
    for linear in linears:
        made = [layer for layer in products if linear.module in layer.nodes]
        if len(made) != 1:
            yield f"{linear.module}: became {len(made)} matrix products, expected 1"
        elif linear in can_fuse:
            yield from _unfused(linear, made[0])


def _unfused(linear: Linear, product: CompiledLayer) -> Iterator[str]:
    """What of a quantized linear was dequantized before its product."""
    weights, inputs = linear.format.weights, linear.format.inputs
    if _DTYPES[weights] not in product.constant_dtypes:
        yield f"{linear.module}: the {weights} weight is not part of the matrix product"
    if inputs is not None and _DTYPES[inputs] not in product.input_dtypes:
        yield f"{linear.module}: the matrix product does not take its input as {inputs}"


def _attention_problems(layers: list[CompiledLayer], num_layers: int) -> Iterator[str]:
    for index in range(num_layers):
        node = f"layers.{index}.attention"
        fused = [layer for layer in layers if layer.name.startswith(_FUSED_ATTENTION)]
        made = [layer for layer in fused if node in layer.nodes]
        if len(made) != 1:
            yield f"{node}: became {len(made)} fused attention kernels, expected 1"
    if not any(KV_LENGTHS in layer.inputs for layer in layers):
        yield f"{KV_LENGTHS}: no layer reads it, so attention would cover the whole cache"


def _cache_problems(layers: list[CompiledLayer], num_layers: int) -> Iterator[str]:
    """In place means: a layer reads and writes `present`, and nothing touches `past`."""
    for index in range(num_layers):
        for past, present in cache_names(index):
            copies = [layer.name for layer in layers if past in (*layer.inputs, *layer.outputs)]
            if copies:
                yield f"{past}: the whole cache is copied by {', '.join(copies)}"
            if not any(present in layer.inputs and present in layer.outputs for layer in layers):
                yield f"{present}: no layer updates it in place"


def _sum_problems(layers: list[CompiledLayer], names: tuple[str, ...]) -> Iterator[str]:
    collectives = [layer for layer in layers if layer.kind.startswith(_COLLECTIVE)]
    for name in names:
        made = [layer for layer in collectives if layer.nodes == (name,)]
        if [layer.kind for layer in made] != [_ALL_REDUCE]:
            kinds = ", ".join(layer.kind for layer in made) or "none"
            yield f"{name}: became {kinds}, expected one {_ALL_REDUCE}"
    for layer in collectives:
        if not set(layer.nodes) & set(names):
            yield f"{layer.name}: a collective that the network does not have"
