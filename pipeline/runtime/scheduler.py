"""A thread that steps a Session for as long as anyone waits for tokens."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from typing import Protocol

from pipeline.errors import PipelineError, Problem, StageError
from pipeline.runtime.generation import Generation, TokenEvent
from pipeline.runtime.requests import PreparedRequest
from pipeline.runtime.session import Session

_LOG = logging.getLogger(__name__)  # without other settings errors go to standard error


class Sink(Protocol):
    """Where the events of one request go; called from the scheduler's thread only."""

    def is_cancelled(self) -> bool:
        """Asked before every step; True frees the slot."""

    def send(self, event: TokenEvent) -> None:
        """The next event; one with a finish reason is the last call."""

    def fail(self, error: PipelineError) -> None:
        """No further event will come; the last call."""


class Scheduler:
    """Owns a Session and its only stepping thread.

    Whatever happens, every submitted request gets a last call of its sink: a client that waits for an
    answer that never comes is the worst failure of a server.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed = threading.Condition()
        self._inbox: deque[tuple[PreparedRequest, Sink]] = deque()
        self._running: list[tuple[Generation, Sink]] = []
        self._ended: StageError | None = None  # set once: no request is taken any more
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, request: PreparedRequest, sink: Sink) -> None:
        """Queue a request; its events go to `sink`. Callable from any thread.

        Raises:
            StageError: the scheduler has stopped, or has died from an error.
        """
        with self._changed:
            if self._ended is not None:
                raise self._ended
            self._inbox.append((request, sink))
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after its current step; requests that are not done fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        ended = Problem(
            "scheduler", "it died from an error", fix="see the server's log; restart it"
        )
        try:
            while self._take_new():
                self._cancel_abandoned()
                self._session.step()
                self._deliver()
            ended = Problem("scheduler", "the server is stopping")
        finally:  # an unexpected error goes on to the thread's excepthook, which prints it
            self._fail_all(StageError(ended))

    def _take_new(self) -> bool:
        """Wait for work; False when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._inbox or self._running):
                self._changed.wait()
            while self._inbox:
                # Taken out of the inbox only when it is in the other list, or was told that it failed.
                self._admit(*self._inbox[0])
                self._inbox.popleft()
            return not self._stopping

    def _admit(self, request: PreparedRequest, sink: Sink) -> None:
        try:
            generation = self._session.submit(request)
        # Any bug that this request has found is no reason to end the others.
        except Exception:  # noqa: BLE001
            _LOG.exception("a request could not be started")
            sink.fail(
                StageError(Problem("scheduler", "an unexpected error", fix="see the server's log"))
            )
            return
        self._running.append((generation, sink))

    def _cancel_abandoned(self) -> None:
        # A request that waits for a slot is asked when it gets one: asking thousands takes long.
        for generation, sink in self._running:
            if generation.slot is not None and sink.is_cancelled():
                self._session.cancel(generation)

    def _deliver(self) -> None:
        for pair in tuple(self._running):
            generation, sink = pair
            while generation.events:
                sink.send(generation.events.popleft())
            if generation.error is not None:
                sink.fail(generation.error)
            if generation.has_ended:
                self._running.remove(pair)

    def _fail_all(self, error: StageError) -> None:
        with self._changed:
            self._ended = error
            sinks = [sink for _, sink in (*self._running, *self._inbox)]
            self._running, self._inbox = [], deque()
        with contextlib.ExitStack() as calls:  # makes every call, also after one that raises
            for sink in reversed(sinks):
                calls.callback(sink.fail, error)
