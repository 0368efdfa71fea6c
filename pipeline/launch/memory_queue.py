"""Ranks on one host take turns, so that those at work fit into memory together."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.memory import free_memory_bytes

_POLL_S = 0.1


@dataclass
class _State:
    """Of all ranks of one host.

    Attributes:
        bound: bytes that they may take together.
        started: those that have begun, in order.
        running: rank -> bytes that it is expected to take.
    """

    bound: int
    started: list[int] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)


class MemoryQueue:
    """Admits ranks in their order while what they are expected to take stays below a bound.

    One file with a lock: no MPI call that would spin while a rank waits for hours. Nothing is to be
    mended when a rank is killed, because then the whole job ends.

    Args:
        path: the file; one for each host and job.
        ranks: all that will queue here, in order.
        bound: bytes that they may take together; None: what is free when the first one asks.
    """

    def __init__(self, path: Path, ranks: Sequence[int], bound: int | None) -> None:
        self._path = path
        self._ranks = list(ranks)
        self._bound = bound

    @contextmanager
    def turn(self, rank: int, size: int, say: Callable[[str], None]) -> Iterator[None]:
        """Wait until it is this rank's turn, and hold its share meanwhile.

        A rank that is larger than the bound runs alone: the size is an estimate.

        Args:
            say: called once with why the rank has to wait.
        """
        has_said = False
        while (answer := self._admit(rank, size)) != "starts":
            if answer == "no memory" and not has_said:
                say(f"waits for {size / 1e9:.1f} GB of memory")
                has_said = True
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            with self._locked() as state:
                del state.running[str(rank)]

    def bound(self) -> int:
        """Bytes that ranks may take together."""
        with self._locked() as state:
            return state.bound

    def _admit(self, rank: int, size: int) -> Literal["starts", "not its turn", "no memory"]:
        with self._locked() as state:
            before = self._ranks[: self._ranks.index(rank)]
            if not set(before) <= set(state.started):
                return "not its turn"
            if state.running and sum(state.running.values()) + size > state.bound:
                return "no memory"
            state.started.append(rank)
            state.running[str(rank)] = size
            return "starts"

    @contextmanager
    def _locked(self) -> Iterator[_State]:
        """The state, read before and written after."""
        with self._path.open("a+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            text = stream.read()
            state = _State(**json.loads(text)) if text else _State(self._first_bound())
            yield state
            stream.seek(0)
            stream.truncate()
            json.dump(asdict(state), stream)

    def _first_bound(self) -> int:
        return free_memory_bytes() if self._bound is None else self._bound


def too_large(size: int, bound: int) -> str:
    """What to say beforehand of a rank that alone is larger than the bound."""
    return (
        f"may take {size / 1e9:.4g} GB of memory, more than the {bound / 1e9:.4g} GB that ranks have; "
        "it runs alone"
    )
