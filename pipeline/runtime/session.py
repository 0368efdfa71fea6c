"""Many requests on one engine: every request owns a slot (a row of the KV cache) while it runs.

Requests join and leave between steps. A step feeds one chunk of one prompt, then gives one token to
every request whose prompt is done, all in one batch. Which requests share a batch changes nothing in
what each of them gets, up to the rounding of batched matrix products.

Shapes: B rows of the batch, S tokens per row, M logit positions per row, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.errors import PlanError, Problem
from pipeline.runtime.generation import Generation, TokenEvent
from pipeline.runtime.requests import (
    GenerationRequest,
    PreparedRequest,
    RequestLimits,
    prepare_request,
)
from pipeline.runtime.tokenizer import TextTokenizer

PREFILL_CHUNK = 256
"""Prompt tokens per step: long enough to be efficient, short enough that running streams go on."""


class Session:
    """An engine directory, ready to generate. Only `prepare` may be called from other threads.

    Args:
        engine_dir: rank0.onnx, rank0.weights and tokenizer/.
        num_slots: requests that run at the same time; None: what the engine was built for.
        num_threads: threads of one matrix product; None: every core.
        prefill_chunk: most prompt tokens per step.

    Raises:
        PlanError: more slots than the engine's max_batch_size, or fewer than one.
        CheckpointError: tokenizer missing or broken.
        GateError: network missing or broken.
    """

    def __init__(
        self,
        engine_dir: Path,
        num_slots: int | None = None,
        *,
        num_threads: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        from pipeline.engine.onnxruntime import OnnxNetwork

        self.tokenizer = TextTokenizer(engine_dir / "tokenizer")
        self._network = OnnxNetwork(engine_dir, num_threads=num_threads)
        limits = self._network.shape.limits
        self.limits = RequestLimits(
            max_input_len=limits.max_input_len,
            max_seq_len=limits.max_seq_len,
            vocab_size=self._network.shape.vocab_size,
        )
        rows = _checked_slots(num_slots, limits.max_batch_size)
        self._cache = self._network.new_cache(rows)
        self._free_slots = list(range(rows))
        self._active: list[Generation] = []  # in the order of arrival, as is _waiting
        self._waiting: deque[Generation] = deque()
        self._prefill_chunk = prefill_chunk

    @property
    def num_slots(self) -> int:
        """Requests that can run at the same time."""
        return self._cache.num_rows

    @property
    def num_active(self) -> int:
        """Requests that own a slot."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Check a request and tokenize its prompt.

        Raises:
            RequestError: with every problem of the request.
        """
        return prepare_request(request, self.tokenizer, self.limits)

    def submit(self, request: PreparedRequest) -> Generation:
        """Queue a request; it gets the next free slot in the order of arrival."""
        generation = Generation(request, self.tokenizer)
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request now; its slot is free for the next step. Harmless when it has ended."""
        generation.cancel()
        if generation.slot is not None:
            self._release_ended()
        elif generation in self._waiting:
            self._waiting.remove(generation)

    def step(self) -> bool:
        """Advance every running request; False when there was nothing to do."""
        self._admit()
        if not self._active:
            return False
        self._prefill_oldest()
        self._decode_all()
        self._release_ended()
        return True

    def generate(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        """Run one request to its end. Closing the iterator early cancels it.

        Several iterators may be read in turns: each step advances all of them.

        Raises:
            RequestError: with every problem of the request, when the first event is asked for.
            StageError: the engine computed logits that are not finite.
        """
        generation = self.submit(self.prepare(request))
        try:
            while True:
                while generation.events:
                    yield generation.events.popleft()
                if generation.error is not None:
                    raise generation.error
                if generation.has_ended:
                    return
                self.step()
        finally:
            self.cancel(generation)

    def _admit(self) -> None:
        """The lowest free slots: a decode step computes all rows up to the highest in use."""
        while self._waiting and self._free_slots:
            generation = self._waiting.popleft()
            generation.slot = self._free_slots.pop(0)
            self._active.append(generation)

    def _release_ended(self) -> None:
        for generation in self._active:
            if generation.has_ended and generation.slot is not None:
                # Always, not only after an error: a prompt that is cancelled half-way may have left
                # NaN, too, and nobody has looked at its logits. One position more than was counted:
                # an idle row writes there while others decode.
                self._cache.clear(generation.slot, generation.num_cached + 1)
                bisect.insort(self._free_slots, generation.slot)
                generation.slot = None
        self._active = [generation for generation in self._active if not generation.has_ended]

    def _prefill_oldest(self) -> None:
        """Feed the next chunk of the oldest prompt that is not wholly in the cache."""
        generation = next((one for one in self._active if not one.is_prefilled), None)
        if generation is None:
            return
        assert generation.slot is not None
        chunk = generation.prompt_chunk(self._prefill_chunk)
        start, stop = generation.num_cached, generation.num_cached + len(chunk)
        is_last = stop == len(generation.request.prompt_ids)
        # lm_head is a large part of a small step: only the prompt's last token pays for it.
        logit_positions = [len(chunk) - 1] if is_last else []
        logits_BMV = self._network.run(
            input_ids=np.array([chunk], np.int64),
            position_ids=np.arange(start, stop, dtype=np.int64)[np.newaxis],
            write_indices=np.array([start], np.int64),
            kv_lengths=np.array([stop], np.int64),
            logit_positions=np.array([logit_positions], np.int64),
            cache=self._cache.rows(generation.slot, generation.slot + 1),
        )
        generation.num_cached = stop
        if is_last:
            generation.take(logits_BMV[0, 0])

    def _decode_all(self) -> None:
        """One token for every request that has its first one, in one batch of the rows up to the last.

        Rows between them that have nothing to decode compute along: what they write lies at a
        position that their next real write covers, and nobody reads their logits.
        """
        running = [one for one in self._active if not one.has_ended]
        decoding = {one.slot: one for one in running if one.is_prefilled and one.slot is not None}
        if not decoding:
            return
        num_rows = max(decoding) + 1
        tokens_B = np.zeros(num_rows, np.int64)
        positions_B = np.zeros(num_rows, np.int64)
        for generation in running:
            if generation.slot is not None and generation.slot < num_rows:
                positions_B[generation.slot] = generation.num_cached
        for slot, generation in decoding.items():
            tokens_B[slot] = generation.output_ids[-1]
        logits_BMV = self._network.run(
            input_ids=tokens_B[:, np.newaxis],
            position_ids=positions_B[:, np.newaxis],
            write_indices=positions_B,
            kv_lengths=positions_B + 1,
            logit_positions=np.zeros((num_rows, 1), np.int64),
            cache=self._cache.rows(0, num_rows),
        )
        for slot, generation in decoding.items():
            generation.num_cached += 1
            generation.take(logits_BMV[slot, 0])


def _checked_slots(num_slots: int | None, max_batch_size: int) -> int:
    rows = max_batch_size if num_slots is None else num_slots
    if not 1 <= rows <= max_batch_size:
        raise PlanError(
            Problem(
                where="num_slots",
                what=str(rows),
                allowed=f"1 to the engine's max_batch_size = {max_batch_size}",
                fix="ask for fewer slots, or build the engine with a larger max_batch_size",
            )
        )
    return rows
