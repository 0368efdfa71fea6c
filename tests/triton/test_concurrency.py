"""Many clients at once, and clients that leave."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeline.runtime.requests import GenerationRequest
from pipeline.runtime.session import Session
from pipeline.serving.client import AskOptions, Protocol, ask
from pipeline.serving.server import TritonServer
from tests.triton.conftest import MODEL, NUM_SLOTS, local_text

LONG = 12000  # tokens; many seconds of work, so that what waits for its end is clearly late
PROTOCOLS: list[Protocol] = ["http", "grpc"]


def _stream(server: TritonServer, protocol: Protocol, prompt: str, **options: Any) -> Any:
    url = server.http_url if protocol == "http" else server.grpc_url
    return ask(url, protocol, prompt, model=MODEL, options=AskOptions(**options), stream=True)


def _text(server: TritonServer, protocol: Protocol, prompt: str, **options: Any) -> str:
    return "".join(piece.text for piece in _stream(server, protocol, prompt, **options))


def test_requests_together_get_what_they_get_alone(server: TritonServer, local: Session) -> None:
    """Twelve requests of different lengths over two slots: they wait, join, and leave."""
    prompts = [f"The dog number {number} and" for number in range(12)]
    lengths = [5 + 7 * (number % 4) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        futures = [
            pool.submit(_text, server, PROTOCOLS[number % 2], prompt, max_tokens=length)
            for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        texts = [future.result(timeout=60) for future in futures]
    assert texts == [
        local_text(local, GenerationRequest(prompt, max_tokens=length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def test_a_seed_repeats_whatever_else_runs(server: TritonServer) -> None:
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 77}
    alone = _text(server, "grpc", "The lazy fox", **options)
    other = _stream(server, "grpc", "Noise", max_tokens=LONG, temperature=2.0)
    next(other)
    assert _text(server, "grpc", "The lazy fox", **options) == alone
    other.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_leaves_frees_its_slot(server: TritonServer, protocol: Protocol) -> None:
    """All slots are taken by long streams; when one leaves, a waiting request gets its place."""
    streams = [
        _stream(server, protocol, f"Noise {number}", max_tokens=LONG, temperature=2.0, seed=number)
        for number in range(NUM_SLOTS)
    ]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_text, server, "grpc", "May I?", max_tokens=3)
        time.sleep(0.3)
        assert not waiting.done()
        streams[0].close()
        waiting.result(timeout=20)
        assert next(streams[1]).finish_reason is None  # the other one goes on
    streams[1].close()


def test_abandoned_requests_do_not_pile_up(server: TritonServer) -> None:
    """A crowd that leaves at once; afterwards the server is as quick as before."""
    crowd = [
        _stream(server, "grpc", f"Crowd {number}", max_tokens=LONG, temperature=2.0, seed=number)
        for number in range(2 * NUM_SLOTS)
    ]
    for stream in crowd[:NUM_SLOTS]:
        next(stream)
    for stream in crowd:
        stream.close()
    begin = time.monotonic()
    _text(server, "grpc", "And now?", max_tokens=3)
    # One abandoned stream alone would take several seconds; observed 0.02 s.
    assert time.monotonic() - begin < 2.5
