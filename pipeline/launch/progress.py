"""Progress of ranks, which are other processes and may be on other hosts, in one view.

Each rank appends JSON lines to a file of its own; whoever waits for the ranks reads what is new.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.progress import Progress

_READ_EVERY_S = 0.25

Event = dict[str, Any]
"""{"event": "start", "total", "unit"}, {"event": "advance"}, or {"event": "say" or "status", "text"}."""


class RankProgress:
    """Progress of one rank: lines for the reader, and what is said as plain text into the log.

    Args:
        path: the rank's own file; None writes the log alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("ab", buffering=0)

    def start(self, total: int, unit: str) -> None:
        """Begin at zero of `total` units."""
        print(f"{total} {unit}", flush=True)
        self._send(event="start", total=total, unit=unit)

    def advance(self, note: str = "") -> None:
        """One more unit is done."""
        self._send(event="advance")

    def say(self, text: str) -> None:
        """One line, for the log and for people."""
        print(text, flush=True)
        self._send(event="say", text=text)

    def status(self, text: str) -> None:
        """What it does now."""
        self._send(event="status", text=text)

    def _send(self, **event: Any) -> None:
        if self._file is not None:
            self._file.write((json.dumps(event) + "\n").encode())


class ProgressFiles:
    """Reads what ranks append to their files.

    Args:
        paths: they need not exist yet.
        on_event: called with the index of the file and the event.
    """

    def __init__(self, paths: Sequence[Path], on_event: Callable[[int, Event], None]) -> None:
        self._paths = list(paths)
        self._on_event = on_event
        self._read_bytes = [0] * len(self._paths)
        self._last_s = 0.0

    def poll(self) -> None:
        """Read what is new, a few times a second at most."""
        now = time.monotonic()
        if now - self._last_s >= _READ_EVERY_S:
            self._last_s = now
            self.finish()

    def finish(self) -> None:
        """Read what is new."""
        for index, path in enumerate(self._paths):
            for line in self._new_lines(index, path):
                try:
                    event = json.loads(line)
                except ValueError:  # cut off when a disk was full
                    continue
                self._on_event(index, event)

    def _new_lines(self, index: int, path: Path) -> list[bytes]:
        try:
            with path.open("rb") as stream:
                stream.seek(self._read_bytes[index])
                new = stream.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]  # a line may be on its way
        self._read_bytes[index] += len(whole)
        return whole.splitlines()


class RanksView:
    """Puts the events of several ranks into one line: `rank 1: 12 of 42 layers; rank 2: compiling`.

    Args:
        names: of the ranks, in the order of their files.
        progress: where the line goes.
    """

    def __init__(self, names: Sequence[str], progress: Progress) -> None:
        self._names = list(names)
        self._progress = progress
        self._states: dict[int, str] = {}
        self._finished: set[int] = set()
        self._shown = ""
        self._counts: dict[int, tuple[int, int, str]] = {}

    def on_event(self, index: int, event: Event) -> None:
        """For ProgressFiles."""
        kind = event["event"]
        if kind == "start":
            self._count(index, 0, event["total"], event["unit"])
        elif kind == "advance":
            done, total, unit = self._counts[index]
            self._count(index, done + 1, total, unit)
        else:
            self._states[index] = event["text"]
            if kind == "say":
                self._progress.say(f"{self._names[index]}: {event['text']}")

    def show(self) -> None:
        """Pass on what the ranks do now, if it is something new."""
        text = self.text()
        if text != self._shown:
            self._shown = text
            self._progress.status(text)

    def done(self, index: int) -> None:
        """A rank has finished."""
        self._finished.add(index)  # its last events may be read after this
        self._progress.advance(f"{self._names[index]} is finished")

    def text(self) -> str:
        """What every rank that has begun and is not finished does now."""
        return "; ".join(
            f"{self._names[index]}: {state}"
            for index, state in sorted(self._states.items())
            if index not in self._finished
        )

    def _count(self, index: int, done: int, total: int, unit: str) -> None:
        self._counts[index] = (done, total, unit)
        self._states[index] = f"{done} of {total} {unit}"
