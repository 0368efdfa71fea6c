"""One rank of an engine executed on the CPU, segment by segment, together with the other ranks.

A call takes windows of tokens through one segment after the other, so that the memory is that of one
segment, one layer's cache of one window, and the hidden states of a group of windows.

Shapes: W windows, G windows of one group, T tokens of one window, C tokens of one call, H hidden size,
V tokens that have a logit, R logits of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engine.collectives import Collectives, Floats
from pipeline.engine.cpu_session import bind_cache, bind_input
from pipeline.engine.segments import PLACES, RankGraph, Segment
from pipeline.errors import GateError, Problem
from pipeline.network.io_names import (
    HIDDEN_STATES,
    HIDDEN_STATES_OUT,
    INPUT_IDS,
    KV_LENGTHS,
    LOGIT_POSITIONS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    cache_names,
)
from pipeline.progress import Progress, SilentProgress

GROUP_BYTES = 1 << 29
"""Hidden states of the windows that go through the segments together; a few times as much is held."""

Values = dict[str, list[npt.NDArray[Any]]]
"""Name of a value between segments -> one array [1, T, ...] for each window of a group."""


class ShardedNetwork:
    """A rank of an engine; with one rank, the engine.

    Attributes:
        graph: of this rank.

    Raises:
        GateError: the rank's files are missing, damaged, or those of another rank or mapping.
    """

    def __init__(
        self,
        engine_dir: Path,
        collectives: Collectives,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Args:
        num_threads: of one matrix product; None: every core.
        progress: told of every segment that a group of windows has gone through.
        """
        self._progress = progress or SilentProgress()
        self._collectives = collectives
        self._num_threads = num_threads
        mapping = collectives.mapping
        self.graph = RankGraph(engine_dir, mapping.rank)
        facts = self.graph.facts
        graph_is = (facts.tp, facts.pp, facts.moe_ep, facts.rank)
        wanted = (mapping.tp, mapping.pp, mapping.moe_ep, mapping.rank)
        if graph_is != wanted:
            words = "tp {}, pp {}, moe_ep {}, rank {}"
            raise GateError(
                Problem(
                    str(self.graph.path),
                    f"is the network of {words.format(*graph_is)}",
                    allowed=words.format(*wanted),
                    fix="build again",
                )
            )

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.graph.facts.vocab_size

    @property
    def gathers(self) -> bool:
        """Whether this is the rank that has the logits of all."""
        return self.graph.has_head and self._collectives.mapping.tp_rank == 0

    @property
    def _body(self) -> tuple[Segment, ...]:
        """All segments but the head."""
        segments = self.graph.segments
        return segments[:-1] if self.graph.has_head else segments

    def logits(self, tokens_WT: npt.NDArray[np.int64], call_len: int) -> Iterator[Floats | None]:
        """Logits of all positions of all windows, one call after the other.

        All ranks must call it with the same arguments and go through it to its end. A window sees
        nothing of the others; its tokens are computed in calls of at most `call_len`, the earlier ones
        seen through the cache.

        Args:
            tokens_WT: int64 [W, T], T at most max_seq_len.

        Yields:
            float32 [C, V], window by window; None on all ranks but the tp_rank 0 of the last stage.
            Stages before the last yield nothing.

        Raises:
            GateError: ONNX Runtime cannot load a segment.
        """
        size = self._group_size(tokens_WT.shape[1])
        for first in range(0, len(tokens_WT), size):
            yield from self._group(tokens_WT[first : first + size], call_len)

    def num_steps(self, num_windows: int, num_tokens: int) -> int:
        """How often `progress` is told while `logits` runs."""
        num_groups = -(-num_windows // self._group_size(num_tokens))
        return num_groups * len(self._body)

    def _group_size(self, num_tokens: int) -> int:
        """Windows of one group: the same on all ranks."""
        return max(1, GROUP_BYTES // (4 * num_tokens * self.graph.hidden_size))

    def _group(self, tokens_GT: npt.NDArray[np.int64], call_len: int) -> Iterator[Floats | None]:
        graph = self.graph
        values = self._fed(tokens_GT)
        for segment in self._body:
            self._run(segment, values, call_len)
            self._progress.advance()
        if graph.has_head:
            yield from self._head(values, call_len)
        else:
            self._collectives.send(values.pop(HIDDEN_STATES_OUT))

    def _fed(self, tokens_GT: npt.NDArray[np.int64]) -> Values:
        """What the first segment reads."""
        num_windows, num_tokens = tokens_GT.shape
        if self._collectives.mapping.pp_rank == 0:
            return {INPUT_IDS: [np.ascontiguousarray(tokens_T[None]) for tokens_T in tokens_GT]}
        shape = (1, num_tokens, self.graph.hidden_size)
        hidden = [np.empty(shape, np.float32) for _ in range(num_windows)]
        self._collectives.receive(hidden)
        return {HIDDEN_STATES: hidden}

    def _run(self, segment: Segment, values: Values, call_len: int) -> None:
        """Take all windows through a segment, and sum up over the ranks what it says."""
        session = self.graph.load(segment, self._num_threads)
        names = [name for name in segment.outputs if not name.startswith("present_")]
        made: Values = {name: [] for name in names}
        for window in range(_num_windows(values)):
            reads = {name: values[name][window] for name in segment.inputs if name in values}
            outputs = self._window(session, segment, reads, names, call_len)
            for name, array in zip(names, outputs, strict=True):
                made[name].append(array)
        for name in segment.last_read:
            values.pop(name, None)
        values |= made
        for name, total in segment.sums:
            self._collectives.all_reduce(values[name])
            values[total] = values.pop(name)

    def _window(
        self,
        session: Any,
        segment: Segment,
        reads: dict[str, npt.NDArray[Any]],
        names: list[str],
        call_len: int,
    ) -> list[npt.NDArray[Any]]:
        """A window's outputs of a segment, [1, T, ...] each."""
        cache = self._new_cache(segment)
        num_tokens = next(iter(reads.values())).shape[1]
        calls = []
        for start in range(0, num_tokens, call_len):
            stop = min(start + call_len, num_tokens)
            feeds = {name: array[:, start:stop] for name, array in reads.items()}
            feeds |= _places(segment, start, stop)
            calls.append(_call(session, feeds, cache, names))
        return [np.concatenate(parts, axis=1) for parts in zip(*calls, strict=True)]

    def _new_cache(self, segment: Segment) -> dict[tuple[str, str], Floats]:
        """(past, present) -> memory of both. New for every window: 0 * NaN is NaN, so one bad window
        could spoil the next ones."""
        if segment.cache is None:
            return {}
        shape_1CTD = (1, *self.graph.cache_shape)
        return {names: np.zeros(shape_1CTD, np.float32) for names in cache_names(segment.cache)}

    def _head(self, values: Values, call_len: int) -> Iterator[Floats | None]:
        segment = self.graph.segments[-1]
        session = self.graph.load(segment, self._num_threads)
        reads = [name for name in segment.inputs if name in values]
        num_windows = _num_windows(values)
        for window in range(num_windows):
            num_tokens = values[reads[0]][window].shape[1]
            for start in range(0, num_tokens, call_len):
                stop = min(start + call_len, num_tokens)
                feeds = {name: values[name][window][:, start:stop] for name in reads}
                feeds |= _places(segment, start, stop)
                (logits_1CR,) = _call(session, feeds, {}, [LOGITS])
                slices_PCR = self._collectives.gather(logits_1CR[0])
                yield None if slices_PCR is None else self._joined(slices_PCR)

    def _joined(self, slices_PCR: Floats) -> Floats:
        """[C, V]: the ranks' logits side by side, those of padding rows cut off."""
        logits_CPR = slices_PCR.transpose(1, 0, 2)
        return logits_CPR.reshape(len(logits_CPR), -1)[:, : self.vocab_size]


def _num_windows(values: Values) -> int:
    return len(next(iter(values.values())))


def _places(segment: Segment, start: int, stop: int) -> dict[str, npt.NDArray[np.int64]]:
    """Where a call of one row stands, as far as the segment reads it."""
    places = {
        POSITION_IDS: np.arange(start, stop)[None],
        WRITE_INDICES: np.array([start]),
        KV_LENGTHS: np.array([stop]),
        LOGIT_POSITIONS: np.arange(stop - start)[None],
    }
    return {name: places[name] for name in PLACES.intersection(segment.inputs)}


def _call(
    session: Any,
    feeds: dict[str, npt.NDArray[Any]],
    cache: dict[tuple[str, str], Floats],
    names: list[str],
) -> list[npt.NDArray[Any]]:
    """Outputs `names` of one call; the cache is updated in place."""
    binding = session.io_binding()
    for name, feed in feeds.items():
        bind_input(binding, name, feed)
    for name in names:
        binding.bind_output(name, "cpu")
    for (past, present), array in cache.items():
        bind_cache(binding, past, present, array)
    session.run_with_iobinding(binding)
    return [value.numpy() for value in binding.get_outputs()[: len(names)]]
