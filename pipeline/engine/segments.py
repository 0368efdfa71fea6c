"""The CPU graph of one rank, cut into segments that are loaded one at a time.

A segment ends where the tensor-parallel ranks of a stage sum up, behind the embedding and behind each
decoder layer: whoever runs the segments one after the other has one layer in memory, never the model,
and does the sums between them.

Shapes: B rows, S tokens per row in this call, C key/value heads of the rank, T cache positions,
D head size, H hidden size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from pipeline.engine.cpu_session import load_session
from pipeline.errors import GateError, Problem
from pipeline.network.collectives import ALL_REDUCE
from pipeline.network.export import LIMITS_PROPERTY, cpu_graph_path
from pipeline.network.io_names import (
    HIDDEN_STATES,
    HIDDEN_STATES_OUT,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.network.limits import BuildLimits
from pipeline.network.modules import EMBEDDING
from pipeline.network.rank_facts import RANK_PROPERTY, RankFacts

PLACES = frozenset({POSITION_IDS, WRITE_INDICES, KV_LENGTHS, LOGIT_POSITIONS})
"""Inputs that say where a call stands; every segment may read them."""

_LAYER_END = re.compile(r"layers\.\d+\.mlp\.residual")
_EMBEDDING = ("embedding", "positions")  # first words of the names of its nodes


@dataclass(frozen=True)
class Segment:
    """Neighbouring nodes of a graph.

    Attributes:
        nodes: in the order of the graph.
        inputs: values that it reads: inputs of the graph and outputs of earlier segments.
        outputs: values that the graph gives out or later segments read.
        sums: (output, name of the sum) of what is to be added up over the ranks before anything else
            reads it.
        cache: number of the layer whose cache it reads and writes; None: no layer's.
        last_read: inputs that no later segment reads.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sums: tuple[tuple[str, str], ...]
    cache: int | None
    last_read: tuple[str, ...]


class RankGraph:
    """rank{r}.onnx without its weights.

    Attributes:
        path: of the graph.
        facts: of the rank.
        limits: what the engine was built for.
        cache_shape: (C, T, D).
        hidden_size: H.
        segments: in order of execution; the last one of a last stage is the head.

    Raises:
        GateError: missing, or not made by export_network.
    """

    def __init__(self, engine_dir: Path, rank: int) -> None:
        self.path = cpu_graph_path(engine_dir, rank)
        self._model = _read(self.path)
        graph = self._model.graph
        properties = {entry.key: entry.value for entry in self._model.metadata_props}
        if not {LIMITS_PROPERTY, RANK_PROPERTY} <= set(properties):
            what = "is not a network of this program"
            raise GateError(Problem(str(self.path), what, fix="build again"))
        self.limits = BuildLimits(**json.loads(properties[LIMITS_PROPERTY]))
        self.facts = RankFacts.from_json(properties[RANK_PROPERTY])
        self._inputs = {value.name: value for value in graph.input}
        self._outputs = {value.name: value for value in graph.output}
        self._weights = {weight.name: weight for weight in graph.initializer}
        (past_key, _), _ = cache_names(0)
        _, *shape = _shape(self._inputs[past_key])
        self.cache_shape = (shape[0], shape[1], shape[2])
        self.hidden_size = self._hidden_size()
        self.segments = tuple(_segments(graph, self._weights))

    @property
    def inputs(self) -> tuple[onnx.ValueInfoProto, ...]:
        """Of the whole graph."""
        return tuple(self._inputs.values())

    def _hidden_size(self) -> int:
        for value in (self._inputs.get(HIDDEN_STATES), self._outputs.get(HIDDEN_STATES_OUT)):
            if value is not None:
                return _shape(value)[-1]
        return int(self._weights[EMBEDDING].dims[-1])

    @property
    def has_head(self) -> bool:
        """Whether this is a rank of the last stage."""
        return LOGITS in self._outputs

    def load(self, segment: Segment, num_threads: int | None) -> Any:
        """An onnxruntime.InferenceSession of the segment, with float32 activations everywhere.

        Raises:
            GateError: ONNX Runtime cannot load it.
        """
        names = {name for node in segment.nodes for name in node.input}
        graph = helper.make_graph(
            segment.nodes,
            "segment",
            [self._inputs.get(name) or _hidden(name) for name in segment.inputs],
            [self._outputs.get(name) or _hidden(name) for name in segment.outputs],
            [weight for name, weight in self._weights.items() if name in names],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        return load_session(self.path, num_threads, part=model.SerializeToString())


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise GateError(Problem(str(path), what, fix="build again")) from error
    except DecodeError as error:
        raise GateError(Problem(str(path), "is not an ONNX graph", fix="build again")) from error


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _hidden(name: str) -> onnx.ValueInfoProto:
    """Values between segments are those of the residual stream, or are added to it: [B, S, H]."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "S", "H"])


@dataclass(frozen=True)
class _Cut:
    """Some nodes of the graph that depend on what was computed before, and the sums behind them."""

    nodes: list[onnx.NodeProto]
    sums: list[tuple[str, str]]


def _segments(graph: onnx.GraphProto, weights: dict[str, Any]) -> Iterator[Segment]:
    """What depends on weights and places alone is computed where it is read, not handed on: those
    nodes cost little, and a weight cast to float32 must not outlive its segment."""
    free = set(weights) | PLACES
    free_makers: dict[str, onnx.NodeProto] = {}
    others: list[onnx.NodeProto] = []
    for node in graph.node:
        if all(name in free for name in node.input if name):
            free.update(node.output)
            free_makers |= dict.fromkeys(node.output, node)
        else:
            others.append(node)
    closures = [(_with_free_makers(cut.nodes, free_makers), cut.sums) for cut in _cuts(others)]
    read = [_read_by(nodes) - set(weights) for nodes, _ in closures]
    given_out = {value.name for value in graph.output}
    for index, (nodes, sums) in enumerate(closures):
        made = {name for node in nodes for name in node.output}
        later = set().union(*read[index + 1 :])
        summed = {before for before, _ in sums}
        inputs = read[index] - made
        yield Segment(
            nodes=tuple(nodes),
            inputs=tuple(sorted(inputs)),
            outputs=tuple(sorted(made & (later - free | given_out | summed))),
            sums=tuple(sums),
            cache=_cache_of(inputs),
            last_read=tuple(sorted(inputs - later - PLACES)),
        )


def _cuts(nodes: Sequence[onnx.NodeProto]) -> list[_Cut]:
    cuts = [_Cut([], [])]
    in_embedding = False
    for node in nodes:
        if node.op_type == "Identity" and node.name.endswith(ALL_REDUCE):
            at = cuts[-1] if cuts[-1].nodes else cuts[-2]
            at.sums.append((node.input[0], node.output[0]))
            if at is cuts[-1]:
                cuts.append(_Cut([], []))
            continue
        was_in_embedding, in_embedding = in_embedding, node.name.split(".")[0] in _EMBEDDING
        if was_in_embedding and not in_embedding and cuts[-1].nodes:
            cuts.append(_Cut([], []))
        cuts[-1].nodes.append(node)
        if _LAYER_END.fullmatch(node.name):
            cuts.append(_Cut([], []))
    return [cut for cut in cuts if cut.nodes]


def _with_free_makers(
    nodes: Sequence[onnx.NodeProto], makers: dict[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The nodes, with all that makes what they read from weights and places in front of them."""
    result: dict[str, onnx.NodeProto] = {}

    def add(node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in makers and name not in result:
                add(makers[name])
        result.update(dict.fromkeys(node.output, node))

    for node in nodes:
        add(node)
    return list({id(node): node for node in result.values()}.values())


def _read_by(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input if name}


def _cache_of(inputs: set[str]) -> int | None:
    layers = {int(name.rpartition("_")[2]) for name in inputs if name.startswith("past_")}
    assert len(layers) <= 1, layers
    return layers.pop() if layers else None
