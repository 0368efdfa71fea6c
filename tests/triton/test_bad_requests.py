"""Wrong requests get the reason, at once, and hurt nobody else."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RequestError, StageError, ToolError
from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.session import Session
from pipeline.serving.client import AskOptions, ask
from pipeline.serving.ports import free_ports
from pipeline.serving.server import TritonServer
from tests.triton.conftest import MODEL, local_text


def _post(server: TritonServer, body: bytes, endpoint: str = "generate") -> tuple[int, str]:
    """Status and error text of a raw HTTP request."""
    url = f"{server.http_url}/v2/models/{MODEL}/{endpoint}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, body), timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read().removeprefix(b"data: "))["error"]


@pytest.fixture(autouse=True)
def _still_answers(server: TritonServer, local: Session) -> Iterator[None]:
    """After every wrong request a right one gets its answer."""
    yield
    pieces = ask(server.grpc_url, "grpc", "still?", model=MODEL, options=AskOptions(max_tokens=3))
    text = "".join(piece.text for piece in pieces)
    assert text == local_text(local, GenerationRequest("still?", max_tokens=3))


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "prompt: it is empty; allowed: at least one character or token"),
    ({"max_tokens": 0}, "max_tokens: 0 is not positive; allowed: 1 or more"),
    ({"max_tokens": -3}, "max_tokens: -3 is not positive; allowed: 1 or more"),
    (
        {"max_tokens": 16383},
        "max_tokens: 2 prompt tokens + 16383 = 16385 are more than max_seq_len = 16384; "
        "allowed: 1 to 16382 with this prompt; "
        "fix: ask for fewer tokens, or build the engine with a larger max_seq_len",
    ),
    ({"temperature": -0.5}, "temperature: -0.5; allowed: 0 (greedy) or a larger number"),
    ({"top_k": -1}, "top_k: -1 is negative; allowed: 0 (off) or more"),
    ({"top_p": 0.0}, "top_p: 0; allowed: above 0, at most 1 (off)"),
    ({"top_p": 1.5}, "top_p: 1.5; allowed: above 0, at most 1 (off)"),
    (
        {"stop_words": ["a", ""]},
        "stop_words, number 2: it is empty; allowed: at least one character",
    ),
    ({"stop_words": ["a"] * 17}, "stop_words: there are 17; allowed: at most 16"),
    (
        {"text_input": "x y " * 40},
        "prompt: it has 161 tokens; allowed: at most max_input_len = 96; "
        "fix: shorten it, or build the engine with a larger max_input_len",
    ),
    (
        {"text_input": "x" * 1_000_000},
        "prompt: 1000000 characters are more than 96 tokens can hold; "
        "allowed: at most max_input_len = 96 tokens; "
        "fix: shorten it, or build the engine with a larger max_input_len",
    ),
    (
        {"temprature": 1},
        "temprature: unknown field; allowed: text_input, max_tokens, temperature, top_k, top_p, "
        "seed, stop_words, stream, exclude_input_in_output",
    ),
]


@pytest.mark.parametrize(("wrong", "reason"), WRONG_FIELDS)
def test_http_says_what_is_wrong(server: TritonServer, wrong: dict[str, Any], reason: str) -> None:
    body = json.dumps({"text_input": "x", "max_tokens": 4, **wrong}).encode()
    assert _post(server, body) == (400, reason)
    assert _post(server, body, "generate_stream") == (400, reason)


@pytest.mark.parametrize(
    ("wrong", "reason"), [case for case in WRONG_FIELDS if "temprature" not in case[0]]
)
def test_grpc_says_what_is_wrong(server: TritonServer, wrong: dict[str, Any], reason: str) -> None:
    fields = {"max_tokens": 4, **wrong}
    prompt = fields.pop("text_input", "x")
    options = AskOptions(**{**fields, "stop_words": tuple(fields.get("stop_words", ()))})
    with pytest.raises(RequestError) as caught:
        list(ask(server.grpc_url, "grpc", prompt, model=MODEL, options=options))
    assert str(caught.value) == f"{server.grpc_url} answers: {reason}"


@pytest.mark.parametrize("missing", ["text_input", "max_tokens"])
def test_an_optional_input_does_not_make_up_for_a_required_one(
    server: TritonServer, missing: str
) -> None:
    """Triton itself only counts inputs."""
    fields = {"text_input": "x", "max_tokens": 4, "top_k": 1, "top_p": 0.5}
    del fields[missing]
    body = json.dumps(fields).encode()
    assert _post(server, body) == (400, f"{missing}: it is missing; fix: send it")


def test_a_field_name_that_is_not_utf8(server: TritonServer) -> None:
    status, reason = _post(server, b'{"text_input": "x", "max_tokens": 4, "a\xff": 1}')
    assert status == 400
    assert reason.startswith("request: a field is not UTF-8: ")


def test_an_id_is_part_of_the_protocol(server: TritonServer) -> None:
    status, _ = _post(server, b'{"text_input": "x", "max_tokens": 4, "id": "seven"}')
    assert status == 200


def test_all_problems_at_once(server: TritonServer) -> None:
    options = AskOptions(max_tokens=0, top_p=2.0)
    with pytest.raises(RequestError) as caught:
        list(ask(server.http_url, "http", "", model=MODEL, options=options))
    assert str(caught.value).splitlines() == [
        f"{server.http_url.removeprefix('http://')} answers 400: "
        "prompt: it is empty; allowed: at least one character or token",
        "max_tokens: 0 is not positive; allowed: 1 or more",
        "top_p: 2; allowed: above 0, at most 1 (off)",
    ]


def test_invalid_utf8_over_http(server: TritonServer) -> None:
    body = b'{"text_input": "a\xffb", "max_tokens": 4}'
    assert _post(server, body) == (
        400,
        "prompt: invalid UTF-8 at byte 1 (0xff); allowed: UTF-8 text",
    )


def test_invalid_utf8_over_grpc(server: TritonServer) -> None:
    with pytest.raises(RequestError, match=r"prompt: invalid UTF-8 at byte 2 \(0xc3\)"):
        list(ask(server.grpc_url, "grpc", b"ab\xc3(", model=MODEL))


def test_invalid_utf8_is_found_by_the_http_client(server: TritonServer) -> None:
    with pytest.raises(RequestError, match=r"^prompt: invalid UTF-8 at byte 2 \(0xc3\)"):
        list(ask(server.http_url, "http", b"ab\xc3(", model=MODEL))


@pytest.mark.parametrize(
    "body",
    [
        b'{"text_input": "x", "max_tokens": "4"}',
        b'{"text_input": 5, "max_tokens": 4}',
        b'{"text_input": "x", "max_tokens": 4.5}',
        b'{"text_input": "x", "max_tokens": 4, "seed": -1}',
        b'{"text_input": "x", "max_tokens": 4, "temperature": {"a": 1}}',
        b'{"text_input": "x", "max_tokens": 4',
        b'{"text_input": "x \\ud83d y", "max_tokens": 4}',
        b'{"text_input": ["a", "b"], "max_tokens": 4}',
        b'{"text_input": "x"}',
        b"[]",
        b"",
    ],
)
def test_wrong_json_is_refused_by_triton_itself(server: TritonServer, body: bytes) -> None:
    """Its texts and its choice between 400 and 500 are not ours; that it is an error is what counts."""
    status, reason = _post(server, body)
    assert status in (400, 500)
    assert reason


def test_plain_generate_refuses_a_stream(server: TritonServer) -> None:
    """Triton answers 200 there; our client must not take it for text."""
    body = json.dumps({"text_input": "x", "max_tokens": 9, "stream": True}).encode()
    status, content = _post(server, body)
    assert status == 200
    assert "use generate stream" in json.loads(content)["error"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_unknown_model(server: TritonServer, protocol: Any) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    with pytest.raises(RequestError, match="unknown model: 'nope'"):
        list(ask(url, protocol, "x", model="nope"))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server_says_how_to_start_one(protocol: Any) -> None:
    url = f"127.0.0.1:{free_ports().http}"
    with pytest.raises(ToolError, match=r"no server answers: .*fix: start it with `make serve"):
        list(ask(f"http://{url}" if protocol == "http" else url, protocol, "x", model=MODEL))


def test_something_else_than_triton(server: TritonServer) -> None:
    with pytest.raises((RequestError, StageError)):
        list(ask(server.metrics_url, "http", "x", model=MODEL))


def test_unknown_protocol() -> None:
    with pytest.raises(RequestError, match="protocol: 'ftp'; allowed: http or grpc"):
        list(ask("x", "ftp", "x", model=MODEL))  # type: ignore[arg-type]


_BUG = """
queue = TritonPythonModel._queue

def queue_with_a_bug(self, request, sender):
    if b"boom" in request_text(request):
        raise ZeroDivisionError("a bug")
    queue(self, request, sender)

def request_text(request):
    import triton_python_backend_utils as pb_utils
    return pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)[0]

TritonPythonModel._queue = queue_with_a_bug
"""


def test_a_bug_answers_its_request(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "copy"))
    with (copy / MODEL / "1" / "model.py").open("a") as model:
        model.write(_BUG)
    with TritonServer(copy, MODEL, ports=free_ports(), drain_s=2) as buggy:
        buggy.start()
        buggy.wait_until_answers(timeout_s=120)
        for protocol, url in (("http", buggy.http_url), ("grpc", buggy.grpc_url)):
            with pytest.raises(StageError, match="server: an unexpected error in this request"):
                list(ask(url, protocol, "boom", model=MODEL, timeout_s=20))
        assert list(ask(buggy.grpc_url, "grpc", "x", model=MODEL))[-1].finish_reason == "length"
        assert "ZeroDivisionError: a bug" in buggy.log_path.read_text()
