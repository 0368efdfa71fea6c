"""The key/value cache of the CPU network as plain numpy memory.

Shapes: B rows, C key/value heads, T cache positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CacheArray = npt.NDArray[np.float32]


class KVCache:
    """One key and one value array [B, C, T, D] float32 per layer, updated in place by a run.

    A row serves a new sequence as it is: positions at and beyond its kv_length get weight zero. They
    must hold finite numbers, though, because 0 * NaN is NaN; `clear` a row that may not.
    """

    def __init__(self, keys: Sequence[CacheArray], values: Sequence[CacheArray]) -> None:
        self.keys = tuple(keys)
        self.values = tuple(values)

    @classmethod
    def zeros(cls, num_layers: int, shape: tuple[int, int, int, int]) -> KVCache:
        """All zero; `shape` is (B, C, T, D). The system hands out memory when it is first written."""
        keys, values = ([np.zeros(shape, np.float32) for _ in range(num_layers)] for _ in range(2))
        return cls(keys, values)

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.keys[0].shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self.keys, *self.values))

    def clear(self, row: int, num_positions: int) -> None:
        """Write zeros into the first `num_positions` (at most T) positions of a row."""
        for array_BCTD in (*self.keys, *self.values):
            array_BCTD[row, :, :num_positions] = 0.0

    def rows(self, start: int, stop: int) -> KVCache:
        """Rows start..stop-1 of the same memory; nothing is copied.

        Raises:
            ValueError: not a non-empty range of rows.
        """
        if not 0 <= start < stop <= self.num_rows:
            raise ValueError(f"rows {start}:{stop} of a cache of {self.num_rows} rows")
        return KVCache(
            [array[start:stop] for array in self.keys],
            [array[start:stop] for array in self.values],
        )
