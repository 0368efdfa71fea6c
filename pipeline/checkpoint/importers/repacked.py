"""Linears of AutoAWQ and GPTQ, presented as the tensors that ModelOpt's unified layout has.

`X.qweight`, `X.qzeros` and `X.scales` become, block by block when they are asked for:
    X.weight             U8  [N/2, K]  codes less 8, two rows to a byte
    X.weight_scale       F32 [N, K/g]
    X.weight_zero_point  I8  [N, K/g]  zeros less 8; only if the checkpoint is asymmetric
so W = (code - zero_point) * weight_scale, without rounding anywhere. Everything else passes through.
With `requantize` an asymmetric linear is rounded to symmetric int4 instead: scale = max |W| / 7.

Shapes: N output features, K input features, g group size.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint.dtypes import num_bytes
from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.importers.packing import CODES_PER_WORD, MIDDLE, Packing, pack_pairs
from pipeline.checkpoint.tensor_reader import RowReader, TensorReader, contiguous
from pipeline.errors import CheckpointError, Problem

Array = npt.NDArray[Any]

_MARK: Final = ".qweight"
_GROUP_INDEX: Final = "g_idx"
_STORED: Final = ("qweight", "qzeros", "scales")
_DTYPES: Final = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "scales": ("F16", "BF16", "F32"),
    _GROUP_INDEX: ("I32",),
}
# Output features whose codes are unpacked at a time; a multiple of CODES_PER_WORD.
_STEP: Final = 1024
_HIGHEST_CODE: Final = 7


@dataclass(frozen=True)
class Layout:
    """How the linears of one checkpoint are stored.

    Attributes:
        symmetric: what the config says; it is checked against the zeros.
        requantize: round asymmetric linears to symmetric int4.
    """

    packing: Packing
    group_size: int
    symmetric: bool
    requantize: bool = False

    @property
    def has_zero_points(self) -> bool:
        """Whether the presented tensors include zero points."""
        return not self.symmetric and not self.requantize


@dataclass(frozen=True)
class _Linear:
    module: str
    num_outputs: int
    num_inputs: int

    def stored(self, suffix: str) -> str:
        return f"{self.module}.{suffix}"


class RepackedReader(RowReader):
    """A TensorReader over another. Holds the stored words of one linear at a time."""

    def __init__(self, inner: TensorReader, layout: Layout) -> None:
        """Looks at headers only.

        Raises:
            CheckpointError: every linear whose tensors are incomplete or do not fit together.
        """
        self._inner = inner
        self._layout = layout
        self._linears: dict[str, _Linear] = {}
        self._held: tuple[str, dict[str, Array]] = ("", {})
        self._checked: set[str] = set()
        self.tensors: Mapping[str, TensorInfo] = self._present()

    def drop_zero_biases(self, wanted: Collection[str]) -> None:
        """Forget biases of int4 linears that the model does not have, if they are zeros.

        AutoGPTQ gives every linear a bias. Reads each of them: a few kilobytes a layer. One that is not
        zero stays, and is then reported as unused.
        """
        unwanted = {
            f"{module}.bias" for module in self._linears if f"{module}.bias" not in wanted
        } & self.tensors.keys()
        zeros = {name for name in unwanted if not self._inner.read(name).any()}
        self.tensors = {name: info for name, info in self.tensors.items() if name not in zeros}

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a presented tensor.

        Raises:
            CheckpointError: zeros that contradict the config or mean different things to different
                readers; an order of groups that is not that of the input features.
        """
        module, _, suffix = name.rpartition(".")
        linear = self._linears.get(module)
        if linear is None or name in self._inner.tensors:
            return self._inner.read_rows(name, start, stop)
        if suffix == "weight":
            parts = _parts(2 * start, 2 * stop)
            return np.concatenate([pack_pairs(self._codes(linear, *part)) for part in parts])
        if suffix == "weight_scale":
            return self._scale(linear, start, stop)
        assert suffix == "weight_zero_point", name
        return contiguous(self._zero_points(linear, start, stop))

    def _present(self) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        modules = {name.removesuffix(_MARK) for name in self._inner.tensors if name.endswith(_MARK)}
        hidden = {f"{module}.{suffix}" for module in modules for suffix in _DTYPES}
        for name, info in self._inner.tensors.items():
            if name not in hidden:
                tensors[name] = info
            elif name.endswith(_MARK):
                module = name.removesuffix(_MARK)
                wrong = list(_problems(self._inner.tensors, module, self._layout))
                problems += wrong
                if not wrong:
                    linear = _Linear(module, *self._layout.packing.sizes(info.shape))
                    self._linears[module] = linear
                    tensors |= self._infos(linear, info)
        if problems:
            raise CheckpointError(problems)
        return tensors

    def _infos(self, linear: _Linear, qweight: TensorInfo) -> dict[str, TensorInfo]:
        groups = (linear.num_outputs, linear.num_inputs // self._layout.group_size)
        shapes = {
            "weight": ("U8", (linear.num_outputs // 2, linear.num_inputs)),
            "weight_scale": ("F32", groups),
        }
        if self._layout.has_zero_points:
            shapes["weight_zero_point"] = ("I8", groups)
        return {
            f"{linear.module}.{suffix}": replace(
                qweight,
                name=f"{linear.module}.{suffix}",
                dtype=dtype,
                shape=shape,
                nbytes=num_bytes(dtype, shape),
            )
            for suffix, (dtype, shape) in shapes.items()
        }

    def _codes(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.int8]:
        """Signed codes of output features [start, stop): [N, K]."""
        if not self._layout.requantize or self._layout.symmetric:
            return self._stored_codes(linear, start, stop)
        weight_NK = self._weight(linear, start, stop)
        scale_NG = _symmetric_scale(weight_NK, self._layout.group_size)
        scale_NK = np.repeat(scale_NG, self._layout.group_size, axis=1)
        codes_NK: npt.NDArray[np.int8] = np.rint(weight_NK / scale_NK).astype(np.int8)
        return codes_NK

    def _scale(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.float32]:
        if not self._layout.requantize or self._layout.symmetric:
            return self._stored_scale(linear, start, stop)
        weights = (self._weight(linear, *part) for part in _parts(start, stop))
        return np.concatenate(
            [_symmetric_scale(weight_NK, self._layout.group_size) for weight_NK in weights]
        )

    def _weight(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.float32]:
        """What the stored linear means, float32 [N, K]."""
        g = self._layout.group_size
        zero_NK = np.repeat(self._zero_points(linear, start, stop), g, axis=1)
        scale_NK = np.repeat(self._stored_scale(linear, start, stop), g, axis=1)
        codes_NK = self._stored_codes(linear, start, stop)
        return (codes_NK.astype(np.float32) - zero_NK.astype(np.float32)) * scale_NK

    def _stored_codes(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.int8]:
        first, last = _whole_words(start, stop)
        codes_NK = self._layout.packing.codes(self._stored(linear, "qweight"), first, last)
        signed_NK = contiguous(codes_NK[start - first : stop - first]).view(np.int8)
        signed_NK -= np.int8(MIDDLE)
        return signed_NK

    def _stored_scale(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.float32]:
        scale_GN = self._stored(linear, "scales")[:, start:stop]
        scale_NG: npt.NDArray[np.float32] = contiguous(scale_GN.T).astype(np.float32)
        return scale_NG

    def _zero_points(self, linear: _Linear, start: int, stop: int) -> npt.NDArray[np.int8]:
        first, last = _whole_words(start, stop)
        packing = self._layout.packing
        stored_NG = packing.stored_zeros(self._stored(linear, "qzeros"), first, last)
        zeros_NG = stored_NG[start - first : stop - first].astype(np.int8)
        return zeros_NG + np.int8(packing.zero_offset - MIDDLE)

    def _stored(self, linear: _Linear, suffix: str) -> Array:
        """A stored tensor; those of one linear are kept until another is asked for."""
        if self._held[0] != linear.module:
            self._held = (linear.module, {})
        held = self._held[1]
        if suffix not in held:
            held[suffix] = self._inner.read(linear.stored(suffix))
        if linear.module not in self._checked:
            self._checked.add(linear.module)
            self._check_zeros(linear)
            self._check_group_order(linear)
        return held[suffix]

    def _check_zeros(self, linear: _Linear) -> None:
        packing, where = self._layout.packing, linear.stored("qzeros")
        zeros_NG = self._zero_points(linear, 0, linear.num_outputs)
        if self._layout.symmetric and zeros_NG.any():
            what = (
                f"{np.count_nonzero(zeros_NG)} of {zeros_NG.size} zeros are not {MIDDLE}, but "
                "quantization_config says that the checkpoint is symmetric"
            )
            fix = (
                "set sym (GPTQ) or zero_point (AutoAWQ) in quantization_config as it was quantized"
            )
            raise CheckpointError(Problem(where, what, fix=fix))
        beyond = zeros_NG > 15 - MIDDLE
        if beyond.any():
            what = (
                f"{np.count_nonzero(beyond)} zeros are stored as 15, which is 16 to some readers of "
                f"this format and 0 to others (it adds {packing.zero_offset} to a zero)"
            )
            fix = 'save the checkpoint with checkpoint_format "gptq_v2", which has no such zeros'
            raise CheckpointError(Problem(where, what, "0 to 14", fix))

    def _check_group_order(self, linear: _Linear) -> None:
        name = linear.stored(_GROUP_INDEX)
        if name not in self._inner.tensors:
            return
        usual_K = np.arange(linear.num_inputs) // self._layout.group_size
        if not np.array_equal(self._inner.read(name), usual_K):
            what = "input features are not in the order of their groups: it was made with desc_act"
            raise CheckpointError(Problem(name, what, fix="quantize with desc_act: false"))


def _problems(tensors: Mapping[str, TensorInfo], module: str, layout: Layout) -> Iterator[Problem]:
    """What is wrong with the stored tensors of one linear."""
    qweight = tensors[module + _MARK]
    missing = [suffix for suffix in _STORED if f"{module}.{suffix}" not in tensors]
    for suffix in missing:
        yield Problem(f"{module}.{suffix}", "missing, but the linear has a qweight")
    for suffix, dtypes in _DTYPES.items():
        info = tensors.get(f"{module}.{suffix}")
        if info is not None and info.dtype not in dtypes:
            yield Problem(info.name, f"dtype {info.dtype}", ", ".join(dtypes))
    if len(qweight.shape) != 2:
        yield Problem(qweight.name, f"shape {list(qweight.shape)}", "two dimensions")
        return
    num_outputs, num_inputs = layout.packing.sizes(qweight.shape)
    if num_outputs % CODES_PER_WORD or num_inputs % layout.group_size:
        what = f"{num_outputs} x {num_inputs} weights, with groups of {layout.group_size}"
        allowed = "outputs a multiple of 8, inputs a multiple of the group size"
        yield Problem(qweight.name, what, allowed)
        return
    num_groups = num_inputs // layout.group_size
    expected = layout.packing.shapes(num_outputs, num_inputs, num_groups)
    expected[_GROUP_INDEX] = (num_inputs,)
    for suffix, shape in expected.items():
        info = tensors.get(f"{module}.{suffix}")
        if info is not None and info.shape != shape:
            allowed = f"{list(shape)}, from qweight and group_size {layout.group_size}"
            yield Problem(info.name, f"shape {list(info.shape)}", allowed)


def _symmetric_scale(
    weight_NK: npt.NDArray[np.float32], group_size: int
) -> npt.NDArray[np.float32]:
    """Largest magnitude of each group over 7, as float16 can hold it; 1 for a group of zeros."""
    groups = np.abs(weight_NK).reshape(weight_NK.shape[0], -1, group_size)
    largest_NG = groups.max(axis=2)
    # float16, as the scales of the source were: rounding up keeps every code within -7 to 7.
    exact_NG = largest_NG / np.float32(_HIGHEST_CODE)
    scale_NG = exact_NG.astype(np.float16)
    low_NG = scale_NG.astype(np.float32) < exact_NG
    scale_NG[low_NG] = np.nextafter(scale_NG[low_NG], np.float16(np.inf))
    scale_NG[largest_NG == 0] = 1.0
    wide_NG: npt.NDArray[np.float32] = scale_NG.astype(np.float32)
    return wide_NG


def _parts(start: int, stop: int) -> list[tuple[int, int]]:
    """[start, stop) in parts that end at multiples of _STEP; one empty part when it is empty."""
    edges = [start, *range((start // _STEP + 1) * _STEP, stop, _STEP), stop]
    return list(itertools.pairwise(edges))


def _whole_words(start: int, stop: int) -> tuple[int, int]:
    return start - start % CODES_PER_WORD, stop + -stop % CODES_PER_WORD
