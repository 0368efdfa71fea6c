"""The client against servers that misbehave (right answers: tests/triton)."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.errors import PipelineError, RequestError, StageError, ToolError
from pipeline.serving.answer import Piece, piece_from
from pipeline.serving.client import AskOptions, Protocol, ask, is_ready

LAST = b'{"text_output": "last", "finish_reason": "stop"}'
Reply = Callable[[BaseHTTPRequestHandler, dict[str, object]], None]


@pytest.fixture
def replying() -> Iterator[Callable[[Reply], str]]:
    """Starts a server that treats every POST as told; returns its URL."""
    servers = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply(self, json.loads(body))

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _send(status: int, content: bytes) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, _body: dict[str, object]) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def _ask(url: str, *, stream: bool = True, timeout_s: float = 5.0) -> list[Piece]:
    return list(ask(url, "http", "x", model="m", stream=stream, timeout_s=timeout_s))


def test_pieces_of_a_stream(replying: Callable[[Reply], str]) -> None:
    events = [
        {"text_output": "é "},
        {
            "text_output": "\u2028🙂",
            "finish_reason": "stop",
            "num_input_tokens": 3,
            "num_output_tokens": 9,
        },
    ]
    content = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events)
    assert _ask(replying(_send(200, content.encode()))) == [
        Piece("é "),
        Piece("\u2028🙂", "stop", 3, 9),
    ]


def test_only_what_is_set_is_sent(replying: Callable[[Reply], str]) -> None:
    seen: list[dict[str, object]] = []

    def reply(handler: BaseHTTPRequestHandler, body: dict[str, object]) -> None:
        seen.append(body)
        _send(200, LAST)(handler, body)

    url = replying(reply)
    list(ask(url, "http", "ü".encode(), model="m"))
    options = AskOptions(7, 0.0, 0, 1.0, 0, ("a", "b"), False)
    list(ask(url, "http", "x", model="m", options=options, stream=True))
    assert seen == [
        {"text_input": "ü", "max_tokens": 128, "stream": False},
        {
            "text_input": "x",
            "max_tokens": 7,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 0,
            "stop_words": ["a", "b"],
            "exclude_input_in_output": False,
            "stream": True,
        },
    ]


@pytest.mark.parametrize(
    ("status", "content", "kind", "reason"),
    [
        (400, b'{"error": "top_p: 2"}', RequestError, "answers 400: top_p: 2"),
        (400, b'data: {"error": "top_p: 2"}\n\n', RequestError, "answers 400: top_p: 2"),
        (400, b'{"error": "internal error: boo"}', StageError, "answers 400: internal error: boo"),
        (404, b"", RequestError, "answers 404: Not Found"),
        (500, b'{"error": "boo"}', StageError, "answers 500: boo"),
        (500, b"<html>no Triton", StageError, "not an answer of Triton: b'<html>no Triton'"),
        (200, b'data: {"error": "died"}\n\n', StageError, ": died"),
        (
            200,
            b"<html>\n",
            StageError,
            "not an answer of Triton: b'<html>'; fix: check host and port",
        ),
        (200, b"[1]\n", StageError, "not an answer of Triton"),
        (200, b'{"outputs": []}\n', StageError, "an answer without text_output: ['outputs']"),
    ],
)
def test_errors(
    replying: Callable[[Reply], str],
    status: int,
    content: bytes,
    kind: type[PipelineError],
    reason: str,
) -> None:
    with pytest.raises(kind) as caught:
        _ask(replying(_send(status, content)))
    assert reason in str(caught.value)


def test_an_error_after_the_first_piece(replying: Callable[[Reply], str]) -> None:
    url = replying(_send(200, b'data: {"text_output": "a"}\n\ndata: {"error": "died"}\n\n'))
    pieces = ask(url, "http", "x", model="m", stream=True)
    assert next(pieces).text == "a"
    with pytest.raises(StageError, match="died"):
        next(pieces)


def test_a_connection_that_breaks(replying: Callable[[Reply], str]) -> None:
    def reply(handler: BaseHTTPRequestHandler, _body: dict[str, object]) -> None:
        handler.connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(ToolError, match=r"no server answers: .*; fix: start it with `make serve"):
        _ask(replying(reply))


_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"
_EVENT = b'data: {"text_output": "a"}\n\n'


def _cut_after(listener: socket.socket, sent: bytes, *, resets: bool) -> None:
    """Answer one request with `sent`, then end the connection, politely or as a killed server does."""
    connection, _ = listener.accept()
    with connection:
        request = b""
        while not request.endswith(b"}"):
            request += connection.recv(65536)
        connection.sendall(sent)
        if resets:
            time.sleep(0.2)  # a reset throws away what the client has not read
            no_linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    ("sent", "texts"),
    [
        (_CHUNKED + b"1c\r\n" + _EVENT + b"\r\n", ["a"]),  # without the final chunk
        (_CHUNKED + b"1c\r\n" + _EVENT + b"\r\n0\r\n\r\n", ["a"]),  # whole, but says no end
        (_CHUNKED + b"40\r\n" + _EVENT, []),  # within a chunk; http.client may drop its part
        (_CHUNKED + b"0\r\n\r\n", []),
        (_PLAIN + _EVENT, ["a"]),
        (_PLAIN, []),
        (_PLAIN.replace(b"200 OK", b"500 No"), []),  # within an error
    ],
)
def test_an_answer_that_breaks_off(sent: bytes, texts: list[str], resets: bool) -> None:
    pieces: list[Piece] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(
            target=_cut_after, args=(listener, sent), kwargs={"resets": resets}
        )
        thread.start()
        with pytest.raises(StageError) as caught:
            pieces.extend(ask(url, "http", "x", model="m", stream=True, timeout_s=5.0))
        thread.join()
    assert str(caught.value).startswith(f"{url}: the answer broke off: ")
    assert [piece.text for piece in pieces][: len(texts)] == texts
    assert all(piece.finish_reason is None for piece in pieces)


_GRPC_SERVER = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelStreamInfer(self, requests, context):
        next(requests)
        for number in range(int(sys.argv[1])):
            answer = service_pb2.ModelInferResponse()
            answer.outputs.add(name="text_output", datatype="BYTES", shape=[1, 1])
            answer.raw_output_contents.append(b"\\1\\0\\0\\0a")
            yield service_pb2.ModelStreamInferResponse(infer_response=answer)
        if sys.argv[2] == "dies":
            time.sleep(0.3)
            os._exit(1)

server = grpc.server(ThreadPoolExecutor(1))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("num_pieces", "end"), [(0, "politely"), (2, "politely"), (2, "dies")], ids=str
)
def test_an_answer_over_grpc_that_breaks_off(num_pieces: int, end: str) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    server = subprocess.Popen(
        [sys.executable, "-c", _GRPC_SERVER, str(num_pieces), end],
        stdout=subprocess.PIPE,
        text=True,
    )
    pieces: list[Piece] = []
    try:
        assert server.stdout is not None
        url = f"127.0.0.1:{int(server.stdout.readline())}"
        with pytest.raises(StageError) as caught:
            pieces.extend(ask(url, "grpc", "x", model="m", stream=True, timeout_s=20.0))
    finally:
        server.kill()
        server.communicate()
    assert str(caught.value).startswith(f"{url}: the answer broke off: ")
    assert pieces == [Piece("a")] * num_pieces


WRONG_OPTIONS = [
    (
        AskOptions(max_tokens=2**31, top_k=-(2**31) - 1, seed=-1),
        [
            "max_tokens: 2147483648; allowed: -2147483648 to 2147483647",
            "top_k: -2147483649; allowed: -2147483648 to 2147483647",
            "seed: -1; allowed: 0 to 18446744073709551615",
        ],
    ),
    (AskOptions(seed=2**64), ["seed: 18446744073709551616; allowed: 0 to 18446744073709551615"]),
    (
        AskOptions(stop_words=("a", "\udcff")),
        ["stop_words, number 2: it has a lone surrogate; allowed: valid Unicode text"],
    ),
]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(("options", "problems"), WRONG_OPTIONS)
def test_what_has_no_form_on_the_wire(
    protocol: Protocol, options: AskOptions, problems: list[str]
) -> None:
    """Found before anything is sent: there is no server."""
    with pytest.raises(RequestError) as caught:
        list(ask("127.0.0.1:9", protocol, "x", model="m", options=options))
    assert str(caught.value).splitlines() == problems


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_prompt_that_is_not_unicode(protocol: Protocol) -> None:
    with pytest.raises(RequestError, match=r"^prompt: it has a lone surrogate; allowed: valid"):
        list(ask("127.0.0.1:9", protocol, "a\udcff", model="m"))


def test_a_server_that_keeps_silent(replying: Callable[[Reply], str]) -> None:
    def reply(handler: BaseHTTPRequestHandler, _body: dict[str, object]) -> None:
        time.sleep(1.5)

    begin = time.monotonic()
    with pytest.raises(ToolError, match=r"no answer within 0\.3 s"):
        _ask(replying(reply), timeout_s=0.3)
    assert time.monotonic() - begin < 1.4


def test_a_server_that_falls_silent(replying: Callable[[Reply], str]) -> None:
    def reply(handler: BaseHTTPRequestHandler, body: dict[str, object]) -> None:
        _send(200, b'data: {"text_output": "a"}\n\n')(handler, body)
        time.sleep(1.5)

    with pytest.raises(ToolError, match=r"no answer within 0\.3 s"):
        _ask(replying(reply), timeout_s=0.3)


def test_the_proxy_of_the_environment_is_not_used(
    replying: Callable[[Reply], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert _ask(replying(_send(200, LAST)))[0].text == "last"


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ToolError, match=f"^{url}: no server answers: .*refused"):
            _ask(url)
        assert not is_ready(url, "m")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://a b"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises((ToolError, RequestError)):
        _ask(url)


def test_a_piece_needs_only_its_text() -> None:
    assert piece_from({"text_output": "a", "model_name": "m"}) == Piece("a")
