"""Inputs and outputs of a compiled engine, read from its layer listing, against those of the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.engine.rtx_layers import END_OF_LAYERS
from pipeline.errors import GateError, Problem

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""(least, usual, most) shape of each input."""

_LINE = re.compile(
    r"^ Name: (?P<name>\S+), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), "
    r"Dimensions: \[(?P<shape>[-\d,]*)\].*?ProfileInfo: \[ \{ (?P<profile>.*)$"
)
_BOUND = re.compile(r"(?:Min|Opt|Max)Shape: \[([-\d,]*)\]")
_DTYPES = {"FLOAT": "Float", "FLOAT16": "Half", "INT64": "Int64"}
"""ONNX's words and the compiler's."""
_DYNAMIC = -1


@dataclass(frozen=True)
class Binding:
    """One input or output.

    Attributes:
        mode: "Input" or "Output".
        dtype: the compiler's word.
        shape: -1 where a size is free.
        bounds: least, usual and most shape of an input; empty for an output.
    """

    mode: str
    dtype: str
    shape: Shape
    bounds: tuple[Shape, ...] = ()


def check_io(listing: str, graph_path: Path, profile: Profile, where: str) -> int:
    """Check names, dtypes, shapes and limits of everything that goes in and out; returns how many.

    Args:
        listing: see rtx_layers.
        graph_path: the graph that was compiled.
        profile: of its inputs.
        where: the log, for errors.

    Raises:
        GateError: everything that is missing, unexpected or different.
    """
    found = dict(_compiled(listing))
    expected = dict(_declared(graph_path, profile))
    wrong = [f"{name}: unexpected {found[name].mode}" for name in found if name not in expected]
    for name, binding in expected.items():
        wrong += [f"{name}: {what}" for what in _differences(found.get(name), binding)]
    if wrong:
        raise GateError(Problem(where, what) for what in wrong)
    return len(found)


def _compiled(listing: str) -> Iterator[tuple[str, Binding]]:
    for line in listing.partition(END_OF_LAYERS)[2].splitlines():
        match = _LINE.match(line)
        if match is not None:
            bounds = tuple(_shape(text) for text in _BOUND.findall(match["profile"]))
            yield (
                match["name"],
                Binding(match["mode"], match["dtype"], _shape(match["shape"]), bounds),
            )


def _shape(text: str) -> Shape:
    return tuple(int(size) for size in text.split(",") if size)


def _declared(graph_path: Path, profile: Profile) -> Iterator[tuple[str, Binding]]:
    import onnx

    graph = onnx.load(str(graph_path), load_external_data=False).graph
    for mode, values in (("Input", graph.input), ("Output", graph.output)):
        for value in values:
            tensor = value.type.tensor_type
            dtype = _DTYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)]
            sizes = (_DYNAMIC if dim.dim_param else dim.dim_value for dim in tensor.shape.dim)
            yield value.name, Binding(mode, dtype, tuple(sizes), tuple(profile.get(value.name, ())))


def _differences(found: Binding | None, expected: Binding) -> Iterator[str]:
    if found is None:
        yield f"no such {expected.mode}"
        return
    if (found.mode, found.dtype) != (expected.mode, expected.dtype):
        yield f"{found.mode} of {found.dtype}, expected {expected.mode} of {expected.dtype}"
    if not _fits(found.shape, expected.shape):
        yield f"shape {list(found.shape)}, expected {list(expected.shape)}"
    if found.bounds != expected.bounds:
        yield f"limits {_listed(found.bounds)}, expected {_listed(expected.bounds)}"


def _fits(found: Shape, expected: Shape) -> bool:
    """A size that is free in the graph may be fixed by the limits: one logit per row."""
    return len(found) == len(expected) and all(
        wanted in (_DYNAMIC, size) for size, wanted in zip(found, expected, strict=True)
    )


def _listed(bounds: tuple[Shape, ...]) -> str:
    return " ".join(str(list(shape)) for shape in bounds) or "none"
