"""Scales that are one number each, of linears that become one: the largest, and codes that follow it.

ModelOpt writes an fp8 scale for each of q, k and v; TensorRT-LLM has one for the three. Codes of
a smaller scale are rounded again, as multiples of the largest: what TensorRT-LLM's own loader does, and
the one place where conversion rounds codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.layout import SourceTensor, TargetTensor
from pipeline.checkpoint.tensor_reader import TensorReader
from pipeline.errors import CheckpointError, Problem


def largest_scale(
    reader: TensorReader, sources: Sequence[SourceTensor], at_least: float
) -> npt.NDArray[np.float32]:
    """float32 (), the largest number of the sources and `at_least`.

    Raises:
        CheckpointError: every source that is no scale.
    """
    numbers = read_scales(reader, [source.name for source in sources])
    return np.asarray(max(np.float32(at_least), *numbers), np.float32)


def code_ratios(reader: TensorReader, target: TargetTensor) -> dict[str, np.float32]:
    """For each source whose codes must be rounded again, by its name: what to multiply them by.

    Raises:
        CheckpointError: every scale that is none.
    """
    ratios = {}
    for group in target.groups:
        if len(group) > 1 and all(source.scale for source in group):
            scales = read_scales(reader, [source.scale for source in group])
            largest = max(scales)
            for source, scale in zip(group, scales, strict=True):
                if scale != largest:
                    ratios[source.name] = scale / largest
    return ratios


def rescaled(codes: npt.NDArray[Any], ratio: np.float32) -> npt.NDArray[Any]:
    """Codes times a ratio below 1, rounded to the nearest code."""
    return (codes.astype(np.float32) * ratio).astype(codes.dtype)


def read_scales(reader: TensorReader, names: Sequence[str]) -> list[np.float32]:
    """One number of each tensor.

    Raises:
        CheckpointError: every number that is not finite, or not above 0.
    """
    numbers = [np.float32(reader.read(name).reshape(())) for name in names]
    wrong = [
        Problem(name, f"is {number}", "a scale: finite, above 0")
        for name, number in zip(names, numbers, strict=True)
        if not (np.isfinite(number) and number > 0)
    ]
    if wrong:
        raise CheckpointError(wrong)
    return numbers
