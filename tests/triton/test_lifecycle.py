"""Starting, failing to start, and stopping without a trace."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StageError, ToolError
from pipeline.serving.client import AskOptions, ask
from pipeline.serving.ports import Ports, check_ports, free_ports
from pipeline.serving.process_group import end_group, members
from pipeline.serving.server import SHARED_MEMORY, TritonServer
from tests.triton.conftest import MODEL


def _regions(server_prefix: str) -> list[Path]:
    return sorted(SHARED_MEMORY.glob(f"{server_prefix}*"))


def _stub_of(group: int) -> int:
    for pid in members(group):
        if b"triton_python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("the server has no stub")


def _assert_no_trace(group: int, prefix: str) -> None:
    assert members(group) == []
    assert _regions(prefix) == []


@pytest.mark.parametrize("killed", ["nothing", "stub", "server"])
def test_stop_leaves_no_process_and_no_shared_memory(repository: Path, killed: str) -> None:
    server = TritonServer(repository, MODEL, ports=free_ports(), drain_s=2)
    with server:
        server.start()
        server.wait_until_answers(timeout_s=120)
        group = server.pid
        assert group is not None
        assert len(members(group)) == 2
        assert _regions(server.shm_prefix)
        if killed == "server":
            os.kill(group, signal.SIGKILL)
            with pytest.raises(StageError, match="tritonserver: it ended with signal 9"):
                server.wait()
        elif killed == "stub":  # Triton goes on saying "ready"; only a real question shows it
            os.kill(_stub_of(group), signal.SIGKILL)
            with pytest.raises(
                StageError, match=r"ensemble: it is loaded but does not answer: .*Stub"
            ):
                server.wait_until_answers(timeout_s=30)
    assert members(group) == []
    assert _regions(server.shm_prefix) == []
    server.stop()  # again does no harm


_SERVE = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, if the tests run under nohup
import sys
from pathlib import Path
from pipeline.serving.ports import Ports
from pipeline.serving.server import TritonServer, serve_until_stopped

server = TritonServer(Path(sys.argv[1]), sys.argv[2], ports=Ports(*map(int, sys.argv[3:])), drain_s=3)
start = server.start

def announced_start():
    start()
    print("group", server.pid, server.shm_prefix, flush=True)

server.start = announced_start
serve_until_stopped(server, lambda: print("ready", flush=True))
"""


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "ready"), (signal.SIGHUP, "ready"), (signal.SIGINT, "group")],
)
def test_signals_stop_it_cleanly(repository: Path, number: signal.Signals, moment: str) -> None:
    ports = free_ports()
    arguments = [str(port) for _, port in ports.named()]
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(repository), MODEL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    match = re.fullmatch(r"group (\d+) (\w+)\n", process.stdout.readline())
    assert match is not None, process.communicate()
    try:
        if moment == "ready":
            assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
        _assert_no_trace(int(match[1]), match[2])
    finally:
        process.kill()
        end_group(int(match[1]))


_SLOW_EXECUTE = """
import time
from pathlib import Path

def execute(self, requests):
    Path(__file__).with_name("asked").touch()
    time.sleep(60)

TritonPythonModel.execute = execute
"""


def test_ctrl_c_does_not_wait_for_the_first_answer(repository: Path, tmp_path: Path) -> None:
    slow = Path(shutil.copytree(repository, tmp_path / "slow"))
    version_dir = slow / MODEL / "1"
    with (version_dir / "model.py").open("a") as model:
        model.write(_SLOW_EXECUTE)
    arguments = [str(port) for _, port in free_ports().named()]
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(slow), MODEL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    match = re.fullmatch(r"group (\d+) (\w+)\n", process.stdout.readline())
    assert match is not None, process.communicate()
    try:
        deadline = time.monotonic() + 60
        while not (version_dir / "asked").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - begin < 10  # observed 0.3 s; the model sleeps 60 s
        assert (process.returncode, errors) == (0, "")
        _assert_no_trace(int(match[1]), match[2])
    finally:
        process.kill()
        end_group(int(match[1]))


_SERVE_COMMAND = """
import sys
from pathlib import Path
from pipeline.config import ServeConfig
from pipeline.serving.command import serve

http, grpc, metrics = map(int, sys.argv[3:])
config = ServeConfig(http_port=http, grpc_port=grpc, metrics_port=metrics)
serve(Path(sys.argv[1]), sys.argv[2], config, as_json=False)
"""


def test_closing_the_terminal_ends_the_command_and_the_server(repository: Path) -> None:
    ports = free_ports()
    arguments = [str(port) for _, port in ports.named()]
    command = [sys.executable, "-c", _SERVE_COMMAND, str(repository), MODEL, *arguments]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as above
        os.execv(command[0], command)
    shown = b""
    while b"flush=True)" not in shown:  # the end of what it prints
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    check_ports("127.0.0.1", ports)  # nobody listens there any more


def test_running_streams_are_finished_before_the_end(repository: Path) -> None:
    with TritonServer(repository, MODEL, ports=free_ports(), drain_s=20) as server:
        server.start()
        server.wait_until_answers(timeout_s=120)
        options = AskOptions(max_tokens=300, temperature=2.0, seed=1)
        stream = ask(server.grpc_url, "grpc", "x", model=MODEL, options=options, stream=True)
        first = next(stream)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGTERM)
        last = [first, *stream][-1]
        assert (last.finish_reason, last.num_output_tokens) == ("length", 300)


def _broken_copy(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "broken"))


def _start_error(repository: Path) -> str:
    """Why it does not start; must not take until the time-out."""
    begin = time.monotonic()
    with TritonServer(repository, MODEL, ports=free_ports(), drain_s=2) as server:
        server.start()
        with pytest.raises(StageError) as caught:
            server.wait_until_answers(timeout_s=120)
    assert time.monotonic() - begin < 60
    return str(caught.value)


def test_a_misspelt_config_shows_line_and_column(repository: Path, tmp_path: Path) -> None:
    broken = _broken_copy(repository, tmp_path)
    path = broken / MODEL / "config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size", "max_bach_size"))
    error = _start_error(broken)
    assert error.startswith("tritonserver: it ended with exit code 1:\n")
    assert '3:14: Message type "inference.ModelConfig" has no field named "max_bach_size"' in error
    assert "failed to read text proto" in error


def test_a_broken_engine_shows_the_engines_error(repository: Path, tmp_path: Path) -> None:
    broken = _broken_copy(repository, tmp_path)
    (broken / MODEL / "1" / "engine" / "rank0.onnx").unlink()
    error = _start_error(broken)
    assert "failed to load 'ensemble' version 1" in error
    assert re.search(r"GateError: \S*/rank0\.onnx: ", error)


_WITHOUT_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def test_a_missing_package_is_named(repository: Path, tmp_path: Path) -> None:
    broken = _broken_copy(repository, tmp_path)
    path = broken / MODEL / "1" / "model.py"
    path.write_text(_WITHOUT_PACKAGE + path.read_text())
    error = _start_error(broken)
    assert f"trtpipe is not installed in {sys.prefix}" in error
    assert "first on PATH" in error


def test_a_repository_without_the_model(repository: Path) -> None:
    server = TritonServer(repository, "nope", ports=free_ports())
    with pytest.raises(StageError, match=r"it has no model 'nope'; allowed: ensemble$"):
        server.start()


def test_a_taken_port_is_named_with_its_key(repository: Path) -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports.grpc)):
        server = TritonServer(repository, MODEL, ports=ports)
        with pytest.raises(ToolError) as caught:
            server.start()
    assert str(caught.value) == (
        f"serve.grpc_port: cannot listen on 127.0.0.1:{ports.grpc}: Address already in use; "
        "fix: stop the program that has it, or set serve.grpc_port to a free port"
    )
    assert server.pid is None


def test_every_wrong_port_is_listed() -> None:
    port = free_ports().http
    with pytest.raises(ToolError) as caught:
        check_ports("203.0.113.1", Ports(port, port, free_ports().http))  # not an address of ours
    assert [problem.where for problem in caught.value.problems] == [
        "serve.http_port",
        "serve.grpc_port",
        "serve.metrics_port",
    ]
    assert f"port {port} is also serve.http_port" in str(caught.value)
    assert "Cannot assign requested address" in str(caught.value)
