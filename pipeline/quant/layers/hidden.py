"""Hidden states between two layers: in a file that outlives a killed run, and in memory if they fit.

Shape suffixes: B windows of one batch, T tokens of one window, H hidden size.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.errors import Problem, StageError
from pipeline.quant.layers.batches import Batch

ROOM_FIX = "make room, or use fewer or shorter calibration samples; finished layers are kept"


class HiddenStates:
    """[B, T, H] of every batch, one after the other in a file of plain values without header.

    Attributes:
        path: the file. It is complete once every batch was put.
    """

    def __init__(
        self,
        path: Path,
        batches: Sequence[Batch],
        hidden_size: int,
        dtype: torch.dtype,
        *,
        in_memory: bool,
        room_fix: str = ROOM_FIX,
    ) -> None:
        """Args:
        room_fix: what to do when the disk has no room.
        """
        self.path = path
        self._room_fix = room_fix
        self._dtype = dtype
        self._shapes = [(*batch.tokens_BT.shape, hidden_size) for batch in batches]
        self._offsets = [0]
        for batch in batches:
            size = batch.num_tokens * hidden_size * dtype.itemsize
            self._offsets.append(self._offsets[-1] + size)
        self._kept: dict[int, torch.Tensor] | None = {} if in_memory else None

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._offsets[-1]

    def create(self) -> None:
        """Make the file at its full size, so that a full disk is noticed before the work.

        Raises:
            StageError: no room.
        """
        with self.path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self.num_bytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                    raise
                raise StageError(self._no_room()) from error

    def put(self, index: int, hidden_BTH: torch.Tensor) -> None:
        """Store one batch; threads may put different ones at the same time."""
        values = hidden_BTH.detach().to("cpu", self._dtype).contiguous()
        assert tuple(values.shape) == self._shapes[index], (values.shape, self._shapes[index])
        if self._kept is not None:
            self._kept[index] = values
        data = values.reshape(-1).view(torch.uint8).numpy().data
        offset = self._offsets[index]
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise StageError(Problem(str(self.path), what, fix="make room")) from error
        finally:
            os.close(descriptor)

    def get(self, index: int) -> torch.Tensor:
        """One batch, [B, T, H] on the CPU."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        start, stop = self._offsets[index], self._offsets[index + 1]
        values = torch.empty(stop - start, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            count = file.readinto(values.numpy().data)
        assert count == stop - start, f"{self.path} is shorter than it was"
        return values.view(self._dtype).reshape(self._shapes[index])

    def moved(self, path: Path) -> None:
        """The file has another name now."""
        self.path = path

    def _no_room(self) -> Problem:
        free = shutil.disk_usage(self.path.parent).free
        what = f"needs {self.num_bytes} bytes for hidden states, {free} are free on the disk"
        return Problem(str(self.path), what, fix=self._room_fix)


def fits_in_memory(num_bytes: int, max_bytes: int) -> bool:
    """Whether the hidden states before and after a layer may stay in memory beside it.

    A quarter of what may be used: the layer, its quantization and the libraries need the rest.
    """
    return 2 * num_bytes <= max_bytes // 4
