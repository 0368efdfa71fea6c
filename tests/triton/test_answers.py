"""Right requests over every way in: curl-like HTTP, our client, NVIDIA's tritonclient."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.session import Session
from pipeline.serving.answer import Piece
from pipeline.serving.client import AskOptions, Protocol, ask
from pipeline.serving.server import TritonServer
from tests.triton.conftest import MODEL, local_text

PROMPT = "The quick brown fox"
UNICODE_PROMPT = "Grüße, 日本語 🙂 e\u0301"
WAYS: list[tuple[Protocol, bool]] = [
    ("http", False),
    ("http", True),
    ("grpc", False),
    ("grpc", True),
]


def answer(
    server: TritonServer, protocol: Protocol, prompt: str | bytes, *, stream: bool, **options: Any
) -> list[Piece]:
    """All pieces, through our client."""
    url = server.http_url if protocol == "http" else server.grpc_url
    pieces = ask(
        url,
        protocol,
        prompt,
        model=MODEL,
        options=AskOptions(**options),
        stream=stream,
        timeout_s=60,
    )
    return list(pieces)


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(("protocol", "stream"), WAYS)
@pytest.mark.parametrize("prompt", [PROMPT, UNICODE_PROMPT])
def test_the_answer_is_the_engines(
    server: TritonServer, local: Session, protocol: Protocol, stream: bool, prompt: str
) -> None:
    pieces = answer(server, protocol, prompt, stream=stream, max_tokens=40)
    assert text_of(pieces) == local_text(local, GenerationRequest(prompt, max_tokens=40))
    last = pieces[-1]
    assert last.finish_reason == "length"
    assert last.num_output_tokens == 40
    assert last.num_input_tokens == len(local.tokenizer.encode(prompt))
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert (len(pieces) > 5) == stream


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_streamed_pieces_are_whole_characters(server: TritonServer, protocol: Protocol) -> None:
    options = {"max_tokens": 300, "temperature": 1.5, "seed": 4}
    pieces = answer(server, protocol, UNICODE_PROMPT, stream=True, **options)
    whole = answer(server, protocol, UNICODE_PROMPT, stream=False, **options)
    assert text_of(pieces) == text_of(whole)
    # Random weights make many broken characters, which show as U+FFFD in both; the words in the
    # tokenizer's training text make whole ones of two to four bytes.
    assert any(ord(character) > 0x7F for character in text_of(pieces).replace("\ufffd", ""))


@pytest.mark.parametrize(("protocol", "stream"), WAYS)
def test_stop_words_end_the_answer_and_are_not_in_it(
    server: TritonServer, protocol: Protocol, stream: bool
) -> None:
    whole = text_of(answer(server, protocol, PROMPT, stream=False, max_tokens=30))
    stop_word = whole[6:9]  # spans several tokens of this output
    expected = whole[: whole.index(stop_word)]
    pieces = answer(
        server, protocol, PROMPT, stream=stream, max_tokens=30, stop_words=("never!", stop_word)
    )
    assert text_of(pieces) == expected
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize(("protocol", "stream"), WAYS)
def test_the_prompt_is_repeated_only_on_request(
    server: TritonServer, protocol: Protocol, stream: bool
) -> None:
    plain = text_of(answer(server, protocol, PROMPT, stream=stream, max_tokens=6))
    options = {"max_tokens": 6, "exclude_input_in_output": False}
    assert text_of(answer(server, protocol, PROMPT, stream=stream, **options)) == PROMPT + plain


def test_sampling_repeats_with_a_seed_only(server: TritonServer) -> None:
    def sample(protocol: Protocol, seed: int | None) -> str:
        options = {"max_tokens": 24, "temperature": 1.0, "top_k": 200, "top_p": 0.99, "seed": seed}
        return text_of(answer(server, protocol, PROMPT, stream=False, **options))

    assert sample("http", 5) == sample("grpc", 5)
    assert sample("http", 5) != sample("http", 6)
    assert sample("http", None) != sample("http", None)
    assert sample("grpc", 2**64 - 1) == sample("grpc", 2**64 - 1)


def test_top_k_1_is_greedy_at_any_temperature(server: TritonServer, local: Session) -> None:
    pieces = answer(server, "http", PROMPT, stream=False, max_tokens=20, temperature=9.0, top_k=1)
    assert text_of(pieces) == local_text(local, GenerationRequest(PROMPT, max_tokens=20))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: TritonServer, local: Session) -> None:
    expected = local_text(local, GenerationRequest(PROMPT, max_tokens=12))
    body = {"text_input": PROMPT, "max_tokens": 12}
    assert json.loads(_curl(server, "generate", body)) == {
        "model_name": MODEL,
        "model_version": "1",
        "text_output": expected,
        "finish_reason": "length",
        "num_input_tokens": len(local.tokenizer.encode(PROMPT)),
        "num_output_tokens": 12,
    }
    lines = _curl(server, "generate_stream", {**body, "stream": True}).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["text_output"] for event in events) == expected
    assert len(events) > 3


def _curl(server: TritonServer, endpoint: str, body: dict[str, Any]) -> str:
    url = f"{server.http_url}/v2/models/{MODEL}/{endpoint}"
    command = ["curl", "-s", "--noproxy", "*", "-d", json.dumps(body), url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_tritonclient_streams(server: TritonServer, local: Session) -> None:
    """NVIDIA's own client with the request of TensorRT-LLM's ensemble, shapes [1, 1]."""
    arrays = {
        "text_input": np.array([[PROMPT.encode()]], dtype=np.object_),
        "max_tokens": np.array([[12]], dtype=np.int32),
        "stop_words": np.array([[b"never!", b"not this"]], dtype=np.object_),
        "stream": np.array([[True]]),
    }
    responses = list(_tritonclient_stream(server, arrays))
    texts = [response.as_numpy("text_output")[0, 0].decode() for response in responses]
    assert "".join(texts) == local_text(local, GenerationRequest(PROMPT, max_tokens=12))
    assert len(texts) > 3
    assert responses[-1].as_numpy("finish_reason").tolist() == [[b"length"]]
    assert responses[-1].as_numpy("num_output_tokens").tolist() == [[12]]
    assert {response.get_response().id for response in responses} == {"request 7"}


def _tritonclient_stream(server: TritonServer, arrays: dict[str, np.ndarray]) -> Iterator[Any]:
    import tritonclient.grpc as triton
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    received: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: received.put((result, error)))
        client.async_stream_infer(MODEL, inputs, request_id="request 7")
        while True:
            result, error = received.get(timeout=30)
            assert error is None, error
            yield result
            if result.as_numpy("finish_reason") is not None:
                break


def test_the_repository_says_what_it_takes(server: TritonServer) -> None:
    """Clients such as genai-perf look names and types up."""
    import tritonclient.http as triton

    with triton.InferenceServerClient(server.http_url.removeprefix("http://")) as client:
        metadata = client.get_model_metadata(MODEL)
        config = client.get_model_config(MODEL)
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["inputs"]} == {
        "text_input": "BYTES",
        "max_tokens": "INT32",
        "temperature": "FP32",
        "top_k": "INT32",
        "top_p": "FP32",
        "seed": "UINT64",
        "stop_words": "BYTES",
        "stream": "BOOL",
        "exclude_input_in_output": "BOOL",
    }
    assert {tensor["name"]: tensor["datatype"] for tensor in metadata["outputs"]} == {
        "text_output": "BYTES",
        "finish_reason": "BYTES",
        "num_input_tokens": "INT32",
        "num_output_tokens": "INT32",
    }
    assert config["model_transaction_policy"] == {"decoupled": True}
