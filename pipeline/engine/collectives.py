"""What the ranks of an engine exchange: sums within a stage, hidden states between stages, logits.

Over MPI, a rank that is early sleeps: MPI's own waiting would take a core from those that compute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.errors import Problem, StageError
from pipeline.parallel import Mapping

Floats = npt.NDArray[np.float32]

_POLL_S = 5e-4
_READY, _DATA = 1, 2  # tags


class Collectives(Protocol):
    """Exchanges of one rank; the ranks they concern must all call them, in the same order."""

    @property
    def mapping(self) -> Mapping:
        """Which rank this is."""

    def all_reduce(self, arrays: Sequence[Floats]) -> None:
        """Replace each array by its sum over the tensor-parallel ranks of the stage."""

    def send(self, arrays: Sequence[Floats]) -> None:
        """Give arrays to the rank of the same tp_rank in the next stage."""

    def receive(self, arrays: Sequence[Floats]) -> None:
        """Fill arrays with what the rank of the same tp_rank in the stage before sends."""

    def gather(self, array: Floats) -> Floats | None:
        """The arrays of a stage's ranks, stacked in tp_rank order; None on all but its tp_rank 0."""


class Alone:
    """One rank without the others.

    The only one of its engine misses nobody. One of several sums up its own part alone, receives small
    random numbers, and gathers nothing but its own logits: what it computes means nothing, but shows
    that it computes.

    Attributes:
        sent: all numbers for a next stage.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._random = np.random.default_rng(0)
        self.sent: Floats = np.empty(0, np.float32)

    @property
    def mapping(self) -> Mapping:
        return self._mapping

    def all_reduce(self, arrays: Sequence[Floats]) -> None:
        """A sum of one term."""

    def send(self, arrays: Sequence[Floats]) -> None:
        self.sent = np.concatenate([self.sent, *(array.ravel() for array in arrays)])

    def receive(self, arrays: Sequence[Floats]) -> None:
        for array in arrays:
            array[:] = self._random.standard_normal(array.shape)

    def gather(self, array: Floats) -> Floats | None:
        return array[None]


class OverMpi:
    """Ranks under mpirun: global rank = MPI rank.

    Raises:
        StageError: mpirun started another number of processes than the engine has ranks.
    """

    def __init__(self, tp: int, pp: int, moe_ep: int = 1) -> None:
        from mpi4py import MPI

        self._world: Any = MPI.COMM_WORLD
        if self._world.Get_size() != tp * pp:
            raise StageError(
                Problem(
                    "mpirun",
                    f"started {self._world.Get_size()} processes; the engine has {tp * pp} ranks "
                    f"(tp {tp}, pp {pp})",
                    allowed=f"-n {tp * pp}",
                    fix="start one process for each rank",
                )
            )
        self._mapping = Mapping(tp, pp, self._world.Get_rank(), moe_ep)
        self._stage: Any = self._world.Split(self._mapping.pp_rank, self._mapping.tp_rank)
        self._on_host = self._world.Split_type(MPI.COMM_TYPE_SHARED).Get_size()

    @property
    def mapping(self) -> Mapping:
        return self._mapping

    @property
    def num_threads(self) -> int:
        """This rank's share of the host's cores."""
        return max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // self._on_host))

    def all_reduce(self, arrays: Sequence[Floats]) -> None:
        if self._mapping.tp == 1:
            return
        from mpi4py import MPI

        self._meet()
        for array in arrays:
            self._stage.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)

    def send(self, arrays: Sequence[Floats]) -> None:
        to = self._mapping.rank + self._mapping.tp
        _sleep_until(lambda: self._world.Iprobe(to, _READY))
        self._world.Recv(np.empty(0, np.float32), to, _READY)
        for array in arrays:
            self._world.Send(array, to, _DATA)

    def receive(self, arrays: Sequence[Floats]) -> None:
        source = self._mapping.rank - self._mapping.tp
        self._world.Send(np.empty(0, np.float32), source, _READY)
        for array in arrays:
            _sleep_until(lambda: self._world.Iprobe(source, _DATA))
            self._world.Recv(array, source, _DATA)

    def gather(self, array: Floats) -> Floats | None:
        if self._mapping.tp == 1:
            return array[None]
        self._meet()
        is_root = self._mapping.tp_rank == 0
        stacked = np.empty((self._mapping.tp, *array.shape), np.float32) if is_root else None
        self._stage.Gather(np.ascontiguousarray(array), stacked, root=0)
        return stacked

    def _meet(self) -> None:
        """Wait for the stage's other ranks."""
        _sleep_until(self._stage.Ibarrier().Test)


def _sleep_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(_POLL_S)
