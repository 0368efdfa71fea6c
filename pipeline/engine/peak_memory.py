"""The most memory that the own process took while it did something."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.01


class AnonymousPeak:
    """Within its `with` block, watches the process's anonymous memory: what it cannot give back.

    Resident memory also counts pages of mapped files, such as the weights a compiler reads, which the
    system takes back when it needs room. The kernel keeps a peak only of both together, so the
    anonymous part is read every 10 ms, by a thread; a peak that is shorter may be missed. No thread and
    no number where there is no /proc.
    """

    def __init__(self) -> None:
        self.nbytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> AnonymousPeak:
        if _STATUS.exists():
            self._look()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        found = status_bytes("RssAnon")
        if found is not None:
            self.nbytes = max(self.nbytes or 0, found)


def status_bytes(field: str) -> int | None:
    """A size in /proc/self/status, such as VmHWM; None where there is none."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, pages of files included.

    From /proc where there is one: getrusage would also count the parent before exec.
    """
    found = status_bytes("VmHWM")
    if found is not None:
        return found
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
