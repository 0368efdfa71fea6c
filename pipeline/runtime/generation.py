"""One request on its way: from prompt to finish reason."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StageError
from pipeline.runtime.detokenizer import IncrementalDetokenizer, StopWordFilter
from pipeline.runtime.requests import PreparedRequest
from pipeline.runtime.sampling import Sampler
from pipeline.runtime.tokenizer import TextTokenizer


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"  # end-of-sequence token or stop word
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class TokenEvent:
    """What one step did for one request.

    Attributes:
        token_id: the new token; None when the request was cancelled.
        text: text that became certain; often empty inside a character or a possible stop word.
        finish_reason: set in the last event only.
        num_input_tokens: tokens of the prompt.
        num_output_tokens: tokens generated so far, an end-of-sequence token included.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None
    num_input_tokens: int
    num_output_tokens: int


class Generation:
    """State of one request. A Session fills `events`; whoever asked takes them from its left end."""

    def __init__(self, request: PreparedRequest, tokenizer: TextTokenizer) -> None:
        self.request = request
        self.events: deque[TokenEvent] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: StageError | None = None  # instead of a finish reason
        self.slot: int | None = None  # row of the KV cache, while it runs
        self.num_cached = 0  # tokens whose keys and values are in the slot
        self.output_ids: list[int] = []
        self._eos_ids = tokenizer.eos_ids
        self._sampler = Sampler(request.sampling)
        self._detokenizer = IncrementalDetokenizer(tokenizer.decode, request.prompt_ids)
        self._stop_words = StopWordFilter(request.stop_words)

    @property
    def has_ended(self) -> bool:
        """No further event will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def is_prefilled(self) -> bool:
        """The whole prompt is in the cache, so the first token has been chosen."""
        return self.num_cached >= len(self.request.prompt_ids)

    def prompt_chunk(self, size: int) -> tuple[int, ...]:
        """The next at most `size` prompt tokens that are not in the cache yet."""
        return self.request.prompt_ids[self.num_cached : self.num_cached + size]

    def take(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token from `logits` (float32 [V]) and record what follows from it.

        Logits that are not finite end this request with `error`; the others of the batch go on.
        """
        try:
            token_id = self._sampler.choose(logits)
        except StageError as error:
            self.error = error
            return
        self.output_ids.append(token_id)
        if token_id in self._eos_ids:
            self._finish(token_id, self._flush(), FinishReason.STOP)
            return
        text = self._stop_words.push(self._detokenizer.push(token_id))
        if self._stop_words.stopped:
            self._finish(token_id, text, FinishReason.STOP)
        elif len(self.output_ids) == self.request.max_tokens:
            self._finish(token_id, text + self._flush(), FinishReason.LENGTH)
        else:
            self._record(token_id, text)

    def cancel(self) -> None:
        """End it without another token. Nothing happens when it has ended already."""
        if not self.has_ended:
            self._finish(None, "", FinishReason.CANCELLED)

    def _flush(self) -> str:
        text = self._stop_words.push(self._detokenizer.finish())
        return text if self._stop_words.stopped else text + self._stop_words.finish()

    def _finish(self, token_id: int | None, text: str, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._record(token_id, text)

    def _record(self, token_id: int | None, text: str) -> None:
        self.events.append(
            TokenEvent(
                token_id=token_id,
                text=text,
                finish_reason=self.finish_reason,
                num_input_tokens=len(self.request.prompt_ids),
                num_output_tokens=len(self.output_ids),
            )
        )
