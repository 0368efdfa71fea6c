"""Parts of the server's care that need no server: log, ports, processes, files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StageError, ToolError
from pipeline.serving import tritonserver_files
from pipeline.serving.ports import Ports, check_ports, free_ports
from pipeline.serving.process_group import end_group, members
from pipeline.serving.server import TritonServer, _stop_on_signals, serve_until_stopped
from pipeline.serving.server_log import explain, tail
from pipeline.serving.tritonserver_files import find_triton

# Lines as tritonserver 2.51 printed them, shortened.
LOG = """\
I1120 14:37:33.561004 10527 pinned_memory_manager.cc:283] "Pinned memory pool disabled"
E1120 14:37:33.561300 10527 server.cc:241] "CudaDriverHelper has not been initialized."
[libprotobuf ERROR /tmp/x/text_format.cc:337] Error parsing text-format inference.ModelConfig: 1:24: Message type "inference.ModelConfig" has no field named "max_bach_size".
E1120 14:37:33.429784 10351 model_repository_manager.cc:1460] "Poll failed for model directory 'm': failed to read text proto from /r/m/config.pbtxt"
E1120 14:37:33.511102 10364 backend_model.cc:692] "ERROR: Failed to create instance: ValueError: boo\\n\\nAt:\\n  /r/1/model.py(1): <module>\\n"
E1120 14:37:33.650482 10527 model_lifecycle.cc:642] "failed to load 'e' version 1: Internal: ValueError: boo\\n\\nAt:\\n  /r/1/model.py(1): <module>\\n  <frozen importlib._bootstrap>(241): _call\\n"
I1120 14:37:33.650531 10527 model_lifecycle.cc:777] "failed to load 'e'"
+-------+---------+
| Model | Version |
+-------+---------+

I1120 14:37:33.651127 10527 server.cc:345] "Timeout 5: Found 0 live models"
error: creating server: Internal - failed to load all models
"""  # noqa: E501


def test_the_reasons_in_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(LOG)
    assert explain(path).splitlines() == [
        "Error parsing text-format inference.ModelConfig: 1:24: Message type "
        '"inference.ModelConfig" has no field named "max_bach_size".',
        "Poll failed for model directory 'm': failed to read text proto from /r/m/config.pbtxt",
        "failed to load 'e' version 1: Internal: ValueError: boo (at /r/1/model.py(1): <module>)",
        "creating server: Internal - failed to load all models",
    ]


def test_a_log_without_a_reason_shows_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(40)) + "+--+\n| a |\n\n")
    assert explain(path).splitlines() == [f"line {number}" for number in range(25, 40)]


def test_a_huge_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff" * 3_000_000 + b"\nlast line\n")
    assert tail(path).splitlines()[-1] == "last line"
    assert len(tail(path)) < 300_000


def test_free_ports_pass_and_are_three() -> None:
    ports = free_ports()
    assert len({number for _, number in ports.named()}) == 3
    check_ports("127.0.0.1", ports)


def test_a_closing_connection_does_not_count_as_taken() -> None:
    """The port of a server that was just stopped can be used again at once."""
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports.http)) as listener:
        client = socket.create_connection(("127.0.0.1", ports.http))
        accepted, _ = listener.accept()
        accepted.close()  # the server's side closes first and keeps the port in TIME_WAIT
        client.close()
    check_ports("127.0.0.1", ports)


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(
        ToolError, match=r"serve\.http_port: cannot listen on no\.such\.host\.invalid:"
    ):
        check_ports("no.such.host.invalid", Ports())


def test_ending_a_group_takes_the_grandchildren_along() -> None:
    """A parent that ignores SIGTERM and its child, as a server and its stub."""
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print('started', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    assert len(members(process.pid)) == 2
    begin = time.monotonic()
    end_group(process.pid)
    assert members(process.pid) == []
    assert time.monotonic() - begin < 4
    process.wait()
    process.stdout.close()
    end_group(process.pid)  # nobody left: nothing happens


def test_members_understands_odd_process_names(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 2 (b"
    odd.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(odd), "30"], start_new_session=True)
    try:
        assert members(process.pid) == [process.pid]
    finally:
        process.kill()
        process.wait()


def test_without_the_wheel_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tritonserver_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError) as caught:
        find_triton()
    assert str(caught.value) == (
        "tritonserver: nvidia-pytriton is not installed; "
        "fix: pip install 'trtpipe[triton]' (Linux only)"
    )


def test_what_else_can_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Python without stub and library, numpy 2, and a damaged wheel: all listed."""
    root = tmp_path / "pytriton"
    (root / "tritonserver" / "python_backend_stubs" / "3.8").mkdir(parents=True)
    (root / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tritonserver_files, "LIBPYTHON", "libpython3.99.so.1.0")
    monkeypatch.setattr(tritonserver_files, "PYTHON_VERSION", "3.99")
    monkeypatch.setattr("numpy.__version__", "2.1.0")
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    with pytest.raises(ToolError) as caught:
        find_triton()
    base = root / "tritonserver"
    assert [str(problem) for problem in caught.value.problems] == [
        f"{base}/bin/tritonserver: there is no such file; fix: pip install 'trtpipe[triton]' again",
        f"{base}/backends/python/libtriton_python.so: there is no such file; "
        "fix: pip install 'trtpipe[triton]' again",
        "tritonserver: its python backend has no stub for Python 3.99; allowed: 3.8; "
        "fix: use one of these Python versions",
        "tritonserver: numpy 2.1.0 kills its python backend; allowed: numpy below 2; "
        "fix: pip install 'numpy<2'",
        "tritonserver: its python backend needs libpython3.99.so.1.0, and this Python has none; "
        "fix: apt-get install libpython3.99, or a Python built with --enable-shared",
    ]


def test_a_repository_without_models(tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        TritonServer(tmp_path, "demo").start()
    assert str(caught.value) == f"{tmp_path}: it has no model 'demo'; allowed: it has none"


def test_an_error_before_the_start_restores_the_signals(tmp_path: Path) -> None:
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    with pytest.raises(StageError, match="it has no model"):
        serve_until_stopped(TritonServer(tmp_path, "demo"), lambda: None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_server_under_nohup_ignores_the_end_of_the_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_on_signals(TritonServer(tmp_path, "demo")):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_sighup_does_not_interrupt_the_stop(tmp_path: Path) -> None:
    server = TritonServer(tmp_path, "demo")
    with _stop_on_signals(server):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert server.stop_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("gpu-box", "http://gpu-box:8000"),
    ],
)
def test_urls(tmp_path: Path, host: str, url: str) -> None:
    server = TritonServer(tmp_path, "demo", host=host)
    assert server.http_url == url
    assert server.grpc_url == url.removeprefix("http://").replace("8000", "8001")
    assert server.metrics_url.endswith(":8002/metrics")
    assert str(os.getpid()) in server.shm_prefix
