"""Dtypes of safetensors: names, sizes, numpy types, and the order in which files are laid out."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""Every dtype that is read or written, in the safetensors library's own order."""

LAYOUT_ORDER: Final = {name: index for index, name in enumerate(reversed(NUMPY_DTYPES))}
"""Widest first, so that every tensor is aligned to its own item size."""


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; Python integers, so no shape overflows."""
    count = 1
    for length in shape:
        count *= length
    return count * NUMPY_DTYPES[dtype].itemsize
