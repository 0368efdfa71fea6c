"""What TensorRT's ONNX parser leaves undone in a parsed network, done by hand.

Seen with TensorRT-RTX 1.7.1: the parser drops `nonpad_kv_seqlen` of Attention and sets a causal
mask aligned to the start of the cache, so the engine would attend to the whole cache; and it
multiplies query and key cache by sqrt(scale) even where scale is 1, which costs a copy of the key
cache in every step. ONNX has no sum over ranks: the graph marks its places by Identity nodes
(network.collectives), which the parser keeps as layers of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import Problem, StageError
from pipeline.network.collectives import ALL_REDUCE
from pipeline.network.io_names import KV_LENGTHS

_QUERY, _KEY = 0, 1
_NO_ROOT = -1  # an all-reduce has none


def lower_attention(trt: Any, network: Any, masked: Sequence[bool]) -> None:
    """Give every attention its row lengths and a mask aligned to their end; drop scales of one.

    Args:
        masked: for each attention of the graph, in order, whether it has a mask of its own. Such a
            mask is causal already, and TensorRT takes no other beside it.

    Raises:
        StageError: the parsed network does not look as this version of the parser makes it.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    if len(attentions) != len(masked):
        what = f"{len(attentions)} attention layers after parsing, the network has {len(masked)}"
        raise StageError(Problem("lowering", what))
    if not attentions:
        return
    makers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
    }
    lengths = network.add_cast(_input(network, KV_LENGTHS), trt.int32).get_output(0)
    for layer, has_mask in zip(attentions, masked, strict=True):
        layer.__class__ = trt.IAttentionInputLayer
        for index in (_QUERY, _KEY):
            layer.set_input(index, _unscaled(trt, layer.get_input(index), makers, layer.name))
        attention = layer.attention
        if (attention.mask is not None) != has_mask:
            what = f"{layer.name}: a mask after parsing: {not has_mask}, in the graph: {has_mask}"
            raise StageError(Problem("lowering", what))
        if not has_mask:
            attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
        attention.key_value_lengths = lengths


def lower_all_reduces(trt: Any, network: Any, names: Sequence[str], num_ranks: int) -> None:
    """Put a sum over `num_ranks` ranks in the place of each Identity of `names`.

    Each pipeline stage has a communicator of its own, in which its ranks are numbered by tp_rank, so the
    group is 0 .. num_ranks - 1 on every stage.

    Raises:
        StageError: the parsed network has not exactly these, once each.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    marked = [layer for layer in layers if layer.name.endswith(ALL_REDUCE)]
    found = [layer.name for layer in marked if layer.type == trt.LayerType.IDENTITY]
    if found != list(names):
        what = f"all-reduces after parsing: {_listed(found)}; of the graph: {_listed(names)}"
        raise StageError(Problem("lowering", what))
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            if tensor is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    for layer, name in zip(marked, names, strict=True):
        result = layer.get_output(0)
        layer.name, result.name = f"{name}.mark", f"{name}.mark"
        summed = network.add_dist_collective(
            layer.get_input(0),
            trt.CollectiveOperation.ALL_REDUCE,
            trt.ReduceOperation.SUM,
            _NO_ROOT,
            list(range(num_ranks)),
        )
        summed.num_ranks = num_ranks
        summed.name, summed.get_output(0).name = name, name
        # By this the listing of the compiled layers says what they were made of.
        summed.metadata = layer.metadata
        for reader, index in readers.get(name, ()):
            reader.set_input(index, summed.get_output(0))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _input(network: Any, name: str) -> Any:
    for index in range(network.num_inputs):
        if network.get_input(index).name == name:
            return network.get_input(index)
    raise StageError(Problem("lowering", f"the parsed network has no input {name}"))


def _unscaled(trt: Any, tensor: Any, makers: dict[str, Any], where: str) -> Any:
    """The tensor before the parser's multiplication by one."""
    product = makers.get(tensor.name)
    if product is not None and product.type == trt.LayerType.ELEMENTWISE:
        product.__class__ = trt.IElementWiseLayer
        factor = _constant(trt, product.get_input(1), makers)
        is_one = factor is not None and factor.size == 1 and bool((factor == 1.0).all())
        if product.op == trt.ElementWiseOperation.PROD and is_one:
            return product.get_input(0)
    raise StageError(
        Problem(
            "lowering",
            f"{where}: {tensor.name} is not the multiplication by one that the parser adds",
            fix="the parser of this TensorRT-RTX version differs: use 1.7.1",
        )
    )


def _constant(trt: Any, tensor: Any, makers: dict[str, Any]) -> Any:
    """Value of a constant, seen through casts and reshapes; None if it is computed."""
    layer = makers.get(tensor.name)
    while layer is not None and layer.type in (trt.LayerType.CAST, trt.LayerType.SHUFFLE):
        layer = makers.get(layer.get_input(0).name)
    if layer is None or layer.type != trt.LayerType.CONSTANT:
        return None
    layer.__class__ = trt.IConstantLayer
    return layer.weights
