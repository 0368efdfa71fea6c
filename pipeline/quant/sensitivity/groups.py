"""Groups of linears that get one format, and what they weigh in each.

The bits of a group are what its matrices take in an engine: their codes, and their scales of groups, of
rows and of input features, which are float16 there. Single numbers for a whole matrix and biases are
not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.errors import Problem
from pipeline.models import ARCHITECTURES, ModelShape, Scope
from pipeline.models.architecture import WeightRule
from pipeline.models.linears import rule_linears
from pipeline.quant.backends import refusal
from pipeline.quant.choose import is_kept
from pipeline.quant.formats import FORMATS, QuantFormat, StoredDim

_BITS: Final = {"I8": 8, "F8_E4M3": 8, "F16": 16, "F32": 16}
"""Of an element of a tensor in the TensorRT-LLM checkpoint; float32 scales become float16."""
_ONE_BRANCH: Final = ("mlp.fc", "mlp.gate")
"""TensorRT-LLM fuses the two branches of a gated MLP where it can, so they have one format."""
_CANDIDATES: Final = ("int4_awq", "int8_wo", "int8_sq", "fp8", "fp16")
"""Without w4a8_awq: int4_awq has the same weights, and leaves its inputs alone."""


@dataclass(frozen=True)
class Matrix:
    """A weight of the engine, or a stack of such.

    Attributes:
        rows, columns: output and input features.
        count: experts in the stack; 1 without.
    """

    rows: int
    columns: int
    count: int = 1

    def bits(self, fmt: QuantFormat) -> int:
        """All tensors of the matrix in a format."""
        bits = 0
        for tensor in fmt.tensors:
            dims = (StoredDim(0), StoredDim(1)) if tensor.dims is None else tensor.dims
            if dims:
                sizes = [(self.rows, self.columns)[dim.parent] // fmt.divisor(dim) for dim in dims]
                bits += math.prod(sizes) * self.count * _BITS[tensor.target_dtype]
        return bits

    @property
    def num_weights(self) -> int:
        """Elements."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Group:
    """Linears that have one format.

    Attributes:
        layer: number of the decoder layer.
        kind: what the group is in every layer: TensorRT-LLM's names of its matrices.
        linears: Hugging Face names without ".weight".
        is_kept: stays fp16 whatever the budget.
    """

    layer: int
    kind: str
    linears: tuple[str, ...]
    matrices: tuple[Matrix, ...]
    is_kept: bool = False

    @property
    def num_weights(self) -> int:
        """Elements of all matrices."""
        return sum(matrix.num_weights for matrix in self.matrices)

    def bits(self, fmt: str, group_size: int) -> int:
        """What the group takes in a format."""
        found = FORMATS[fmt]
        sized = found if found.group_size is None else found.with_group_size(group_size)
        return sum(matrix.bits(sized) for matrix in self.matrices)


def format_groups(shape: ModelShape, keep: Sequence[str] = ()) -> tuple[Group, ...]:
    """Every linear of the decoder layers in its group, layer by layer.

    Args:
        keep: patterns of linears that stay fp16; one of them keeps its whole group.
    """
    return tuple(
        group for layer in range(shape.num_layers) for group in _layer_groups(shape, layer, keep)
    )


def _layer_groups(shape: ModelShape, layer: int, keep: Sequence[str]) -> list[Group]:
    rules = [
        rule
        for rule in ARCHITECTURES[shape.architecture].rules_for(shape, Scope.LAYER)
        if rule.quantized
    ]
    together: dict[str, list[WeightRule]] = {}
    for rule in rules:
        module = _module(rule)
        together.setdefault("mlp" if rule.experts or module in _ONE_BRANCH else module, []).append(
            rule
        )
    groups = []
    for members in together.values():
        linears = tuple(
            dict.fromkeys(name for rule in members for name in rule_linears(rule, shape, layer))
        )
        groups.append(
            Group(
                layer=layer,
                kind=" + ".join(_module(rule) for rule in members),
                linears=linears,
                matrices=tuple(_matrix(rule, shape) for rule in members),
                is_kept=any(is_kept(name, keep) for name in linears),
            )
        )
    return groups


def _module(rule: WeightRule) -> str:
    return rule.target.partition("{layer}.")[2]


def _matrix(rule: WeightRule, shape: ModelShape) -> Matrix:
    return Matrix(
        rows=sum(shape.extent(source.axes[0]).size for source in rule.sources),
        columns=shape.extent(rule.sources[0].axes[1]).size,
        count=shape.num_experts if rule.experts else 1,
    )


def candidates(backend: str, sm: int) -> tuple[str, ...]:
    """The formats to choose from for a target, the usual order of their sizes, fp16 last.

    Args:
        backend: a name of `pipeline.quant.backends`.
        sm: compute capability times ten.
    """
    found = [name for name in _CANDIDATES if refusal(name, backend, sm) is None]
    if "int8_wo" in found and "int8_sq" in found:
        found.remove("int8_sq")  # as many bits, and rounded inputs besides
    return tuple(found)


def reachable_bits(
    groups: Sequence[Group], formats: Sequence[str], group_size: int
) -> tuple[float, float]:
    """Least and greatest mean bits per weight that a choice can have."""
    weights = sum(group.num_weights for group in groups)
    sizes = [
        [group.bits(name, group_size) for name in (("fp16",) if group.is_kept else formats)]
        for group in groups
    ]
    return sum(map(min, sizes)) / weights, sum(map(max, sizes)) / weights


def mean_bits(groups: Sequence[Group], chosen: Mapping[str, str], group_size: int) -> float:
    """Bits per weight of all groups together.

    Args:
        chosen: linear -> format; what is not in it is fp16.
    """
    bits = sum(group.bits(chosen.get(group.linears[0], "fp16"), group_size) for group in groups)
    return bits / sum(group.num_weights for group in groups)


def budget_problems(
    groups: Sequence[Group], formats: Sequence[str], group_size: int, budget: float
) -> list[Problem]:
    """A budget of mean bits per weight that cannot be kept, or that leaves nothing to quantize."""
    least, most = reachable_bits(groups, formats, group_size)
    if least == most:
        return [Problem("quantize.keep", "names every linear", fix="use format fp16")]
    if least <= budget < most:
        return []
    below = "are below the smallest mean that can be reached"
    return [
        Problem(
            "quantize.budget",
            f"{budget:g} bits {below if budget < least else 'leave every linear in fp16'}",
            # Rounded inwards, so that what is named here is accepted.
            allowed=f"{math.ceil(least * 100) / 100:.2f} to less than {most:.2f} bits, scales "
            f"included, with {', '.join(formats)}, groups of {group_size}"
            + (" and these `keep` rules" if any(group.is_kept for group in groups) else ""),
        )
    ]
