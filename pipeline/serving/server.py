"""The tritonserver process: start, proof that it answers, stop without a trace.

What facts this rests on (tritonserver 2.51): "ready" is reported even when the python backend's process
is dead, so only a real answer counts; a killed server leaves backend processes and shared memory behind,
so it gets a session of its own that is ended as a whole, and a shared-memory prefix that is swept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from pipeline.errors import PipelineError, Problem, StageError
from pipeline.serving import client
from pipeline.serving.ports import Ports, check_ports
from pipeline.serving.process_group import end_group
from pipeline.serving.server_log import explain, tail
from pipeline.serving.tritonserver_files import (
    TritonFiles,
    find_triton,
    make_backend_directory,
    server_environment,
)

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.1
DRAIN_S = 30
"""How long running requests may go on after a stop was asked for."""


class TritonServer:
    """One tritonserver on one model repository. As a context manager it stops at the end of the block.

    Args:
        repository: the model repository.
        model_name: the model that is asked to prove that the server answers.
        ports: where to listen; they are checked before the start.
        host: address to listen on; the default is reachable from this machine only.
        log_path: where the server's output goes; None: a file that is deleted with the server.
        drain_s: seconds that running requests get when the server is stopped.
    """

    def __init__(
        self,
        repository: Path,
        model_name: str,
        *,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        log_path: Path | None = None,
        drain_s: int = DRAIN_S,
    ) -> None:
        self.repository = repository.absolute()
        self.model_name = model_name
        self.ports = ports or Ports()
        self.host = host
        self._drain_s = drain_s
        self._directory = tempfile.TemporaryDirectory(prefix="trtpipe-triton-")
        self.log_path = log_path or Path(self._directory.name) / "server.log"
        self.shm_prefix = f"trtpipe_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_requested = threading.Event()
        self._has_answered = False

    @property
    def http_url(self) -> str:
        """Base of the HTTP interface."""
        return f"http://{_reachable(self.host)}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """host:port of the gRPC interface."""
        return f"{_reachable(self.host)}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        """Prometheus metrics."""
        return f"http://{_reachable(self.host)}:{self.ports.metrics}/metrics"

    @property
    def pid(self) -> int | None:
        """Process id of the running server; also the id of its process group."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; returns before it answers.

        Raises:
            ToolError: a port is taken, or tritonserver cannot run here.
            StageError: the model is not in the repository.
        """
        assert self._process is None, "started twice"
        if not (self.repository / self.model_name / "config.pbtxt").is_file():
            raise StageError(
                Problem(
                    where=str(self.repository),
                    what=f"it has no model {self.model_name!r}",
                    allowed=", ".join(_models(self.repository)) or "it has none",
                )
            )
        files = find_triton()
        check_ports(self.host, self.ports)
        directory = Path(self._directory.name)
        backends = directory / "backends"
        make_backend_directory(files, backends)
        environment = server_environment(files, directory / "lib")
        with self.log_path.open("wb") as log:
            self._process = self._launch(files, backends, environment, log)

    def wait_until_answers(self, timeout_s: float = 600.0) -> None:
        """Return when the model has answered a prompt over HTTP.

        Raises:
            StageError: the server ended, the model refused to answer, or time is up; with the reason.
            KeyboardInterrupt: `request_stop` was called.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._raise_if_ended()
            if self._is_ready():
                self._ask_once(deadline - time.monotonic())
                self._has_answered = True
                return
            time.sleep(POLL_S)
        raise StageError(
            Problem(
                where=str(self.log_path),
                what=f"the server did not answer within {timeout_s:g} s\n{tail(self.log_path)}",
            )
        )

    def wait(self) -> None:
        """Return when `request_stop` is called.

        Raises:
            StageError: the server ended by itself; with the reason.
        """
        while not self._stop_requested.wait(POLL_S):
            self._raise_if_ended()

    def request_stop(self) -> None:
        """Make `wait` and `wait_until_answers` end soon. Safe in signal handlers and other threads."""
        self._stop_requested.set()

    @property
    def stop_requested(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop_requested.is_set()

    def stop(self) -> None:
        """End the server and everything it left; running requests get `drain_s` to finish.

        Before `wait_until_answers` has returned nobody but us can be waiting: it is ended at once.
        Safe to call at any time and more than once. Interrupted by Ctrl-C, it ends everything at once.
        """
        try:
            if self._has_answered and self._process is not None and self._process.poll() is None:
                self._process.terminate()
                # Unloading takes the server a few seconds on top.
                self._process.wait(timeout=self._drain_s + 10)
        except subprocess.TimeoutExpired:
            pass  # the kill below is the answer
        finally:
            self._clean_up()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _launch(
        self, files: TritonFiles, backends: Path, environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        command = [
            str(files.server),
            f"--model-repository={self.repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            f"--exit-timeout-secs={self._drain_s}",
            # No GPU is used; these keep the server from looking for one.
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--enable-peer-access=false",
        ]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches us only, and we can end all of it.
            start_new_session=True,
        )

    def _is_ready(self) -> bool:
        return client.is_ready(self.http_url, self.model_name)

    def _ask_once(self, timeout_s: float) -> None:
        answer = client.ask(
            self.http_url,
            "http",
            "Hello",
            model=self.model_name,
            options=client.AskOptions(max_tokens=1),
            timeout_s=timeout_s,
        )
        # In a thread of its own, so that a stop or the server's end is noticed meanwhile; what is left
        # of it then ends with the connection, when the server is stopped.
        pool = ThreadPoolExecutor(1)
        asking = pool.submit(list, answer)
        pool.shutdown(wait=False)
        while not wait([asking], POLL_S).done:
            self._raise_if_ended()
        try:
            asking.result()
        except PipelineError as error:
            self._raise_if_ended()
            raise StageError(
                Problem(
                    where=self.model_name,
                    what=f"it is loaded but does not answer: {error}\n{explain(self.log_path)}",
                )
            ) from error

    def _raise_if_ended(self) -> None:
        if self._stop_requested.is_set():
            raise KeyboardInterrupt
        assert self._process is not None, "not started"
        code = self._process.poll()
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise StageError(
                Problem(
                    where="tritonserver", what=f"it ended with {how}:\n{explain(self.log_path)}"
                )
            )

    def _clean_up(self) -> None:
        if self._process is not None:
            end_group(self._process.pid)
            self._process.wait()
        for region in SHARED_MEMORY.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)
        self._directory.cleanup()


def serve_until_stopped(server: TritonServer, on_ready: Callable[[], None]) -> None:
    """Start `server`, call `on_ready` once it has answered, and serve until Ctrl-C, SIGTERM or SIGHUP.

    Each stops it cleanly at any moment, also while it starts; a second Ctrl-C or SIGTERM does so at
    once. SIGHUP comes when the terminal is closed; started with `nohup`, the server outlives that.
    To be called from the main thread.

    Raises:
        PipelineError: it could not start, or ended by itself.
    """
    with _stop_on_signals(server):
        try:
            server.start()
            server.wait_until_answers()
            on_ready()
            server.wait()
        except KeyboardInterrupt:
            pass
        finally:
            server.stop()


@contextlib.contextmanager
def _stop_on_signals(server: TritonServer) -> Iterator[None]:
    """Signals ask for a stop; a second SIGINT or SIGTERM interrupts the stop itself."""

    def handle(number: int, _frame: FrameType | None) -> None:
        # A closed terminal sends SIGHUP twice, once by the kernel and once by the shell.
        if server.stop_requested and number != signal.SIGHUP:
            raise KeyboardInterrupt
        server.request_stop()

    # A flag instead of an exception: an exception between the start of the process and the note of
    # its id would leave it running.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else: nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _models(repository: Path) -> list[str]:
    return sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))


def _reachable(host: str) -> str:
    """An address that clients on this machine can use for what the server listens on."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
