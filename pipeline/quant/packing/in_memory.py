"""Packed tensors of a layer, read as if they lay in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from pipeline.checkpoint.dtypes import NUMPY_DTYPES
from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.tensor_reader import RowReader
from pipeline.quant.dequantized import BESIDE_A_WEIGHT, dequantized

Array = npt.NDArray[Any]

_SAFETENSORS_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_WITHOUT_NUMPY = {  # torch dtype -> one of the same width that both have, and numpy's
    torch.bfloat16: (torch.uint16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
}


class PackedTensors(RowReader):
    """A TensorReader over what `pack_layer` returns; the memory is shared."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._arrays = {name: _as_numpy(tensor) for name, tensor in tensors.items()}
        self.tensors = {
            name: TensorInfo(
                name=name,
                dtype=_SAFETENSORS_NAMES[array.dtype],
                shape=array.shape,
                nbytes=array.nbytes,
                file=Path(),
                offset=0,
            )
            for name, array in self._arrays.items()
        }

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of dimension 0; of a number, itself as [1]."""
        array = self._arrays[name]
        return array[start:stop] if array.shape else array.reshape(1)


def dequantized_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `pack_layer` returned, as the float32 state dict of a plain layer under the same names.

    Norms keep the scales that were folded into them, explicit pre-quant scales are multiplied into the
    columns of their weights: the values that multiply what the checkpoint's norms give. Weights are
    [out, in], for GPT-2 too. `activations.simulate_inputs` adds what formats do to inputs.
    """
    reader = PackedTensors(tensors)
    return {
        name: torch.from_numpy(np.array(dequantized(reader, name)))
        for name in reader.tensors
        if name.rpartition(".")[2] not in BESIDE_A_WEIGHT
    }


def _as_numpy(tensor: torch.Tensor) -> Array:
    shared, dtype = _WITHOUT_NUMPY.get(tensor.dtype, (None, None))
    array: Array = tensor.numpy() if shared is None else tensor.view(shared).numpy().view(dtype)
    return array
