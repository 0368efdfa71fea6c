"""Asking a served model, over HTTP or gRPC, in one piece or streaming."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from pipeline.errors import Problem, RequestError, StageError, ToolError
from pipeline.serving.answer import Piece, broke_off, is_server_fault, not_reachable, piece_from

Protocol = Literal["http", "grpc"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")
# What the server's inputs can hold; the tighter limits of a model are the server's to tell.
_RANGES = {
    "max_tokens": (-(2**31), 2**31 - 1),
    "top_k": (-(2**31), 2**31 - 1),
    "seed": (0, 2**64 - 1),
}
# A proxy of the environment would get in the way of a server on this machine or network.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class AskOptions:
    """What a request may say besides the prompt; None leaves the server's default.

    Attributes are those of pipeline.runtime.requests.GenerationRequest; in addition:
        exclude_input_in_output: False repeats the prompt in front of the answer.
    """

    max_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_words: tuple[str, ...] = ()
    exclude_input_in_output: bool | None = None


def ask(
    url: str,
    protocol: Protocol,
    prompt: str | bytes,
    *,
    model: str,
    options: AskOptions | None = None,
    stream: bool = False,
    timeout_s: float = 300.0,
) -> Iterator[Piece]:
    """Yield the answer to `prompt`: piece by piece when `stream`, else in one. Closing it cancels.

    Args:
        url: "http://host:port" for HTTP, "host:port" for gRPC (a scheme is ignored there).
        protocol: "http" or "grpc".
        prompt: text or its UTF-8 bytes. Over gRPC bytes are sent unchecked: the server looks at them.
        model: name of the model on the server.
        options: the rest of the request.
        stream: whether to get text as it is made.
        timeout_s: longest wait for the next piece (HTTP) or for the whole answer (gRPC), in seconds.

    Raises:
        RequestError: the request cannot be sent, or the server found it wrong; the text tells what.
        ToolError: nobody answers at `url`, or the answer takes too long.
        StageError: the server failed or ended within the answer, or is not one of ours.
    """
    checked = options or AskOptions()
    _check_options(checked)
    if isinstance(prompt, str):
        _check_text("prompt", prompt)
    fields = _fields(checked, stream=stream)
    if protocol == "http":
        pieces = _ask_http(url, model, prompt, fields, stream=stream, timeout_s=timeout_s)
    elif protocol == "grpc":
        from pipeline.serving.grpc_client import ask_grpc

        pieces = ask_grpc(url, model, prompt, fields, timeout_s=timeout_s)
    else:
        raise RequestError(Problem("protocol", repr(protocol), " or ".join(PROTOCOLS)))
    return _to_the_end(pieces, url)


def decode_text(where: str, text: bytes) -> str:
    """Strictly decoded UTF-8.

    Raises:
        RequestError: naming `where` and the first wrong byte.
    """
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            Problem(
                where=where,
                what=f"invalid UTF-8 at byte {error.start} (0x{text[error.start]:02x})",
                allowed="UTF-8 text",
            )
        ) from error


def is_ready(url: str, model: str, timeout_s: float = 2.0) -> bool:
    """Whether the server at `url` says that it can serve `model`; see `ask` for proof."""
    try:
        with _OPENER.open(f"{url}/v2/models/{model}/ready", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _to_the_end(pieces: Generator[Piece, None, None], url: str) -> Iterator[Piece]:
    """The same pieces; an end without a finish reason is an error, not an answer."""
    is_whole = False
    with contextlib.closing(pieces):
        for piece in pieces:
            is_whole = is_whole or piece.finish_reason is not None
            yield piece
    if not is_whole:
        raise broke_off(url, "it ended without a finish_reason")


def _check_options(options: AskOptions) -> None:
    """Refuse what has no form on the wire, all of it at once."""
    problems = []
    for name, (lowest, highest) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not lowest <= value <= highest:
            problems.append(Problem(name, str(value), f"{lowest} to {highest}"))
    if problems:
        raise RequestError(problems)
    for number, word in enumerate(options.stop_words, start=1):
        _check_text(f"stop_words, number {number}", word)


def _check_text(where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            Problem(where, "it has a lone surrogate", "valid Unicode text")
        ) from error


def _fields(options: AskOptions, *, stream: bool) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(options).items() if value is not None}
    if not options.stop_words:
        del fields["stop_words"]
    return {**fields, "stream": stream}


def _ask_http(
    url: str,
    model: str,
    prompt: str | bytes,
    fields: dict[str, Any],
    *,
    stream: bool,
    timeout_s: float,
) -> Generator[Piece, None, None]:
    endpoint = f"{url.rstrip('/')}/v2/models/{model}/{'generate_stream' if stream else 'generate'}"
    text = prompt if isinstance(prompt, str) else decode_text("prompt", prompt)
    body = json.dumps({"text_input": text, **fields}).encode("utf-8")
    request = urllib.request.Request(endpoint, body, {"Content-Type": "application/json"})
    began = False
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            began = True
            for line in response:
                yield from _pieces_of_line(line, url)
    except urllib.error.HTTPError as error:
        raise _http_error(url, error) from error
    except TimeoutError as error:
        raise ToolError(Problem(url, f"no answer within {timeout_s:g} s")) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise (broke_off if began else not_reachable)(url, reason) from error


def _pieces_of_line(line: bytes, url: str) -> Iterator[Piece]:
    """From a line of server-sent events, or from a whole JSON answer, which is one line, too."""
    content = line.removeprefix(b"data:").strip()
    if not content:
        return
    answer = _json_object(content, url)
    if "error" in answer:  # after the first event errors come with status 200
        raise StageError(Problem(url, str(answer["error"])))
    if "text_output" not in answer:
        raise StageError(Problem(url, f"an answer without text_output: {sorted(answer)}"))
    yield piece_from(answer)


def _json_object(content: bytes, url: str) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise _not_triton(url, content) from error
    if not isinstance(answer, dict):
        raise _not_triton(url, content)
    return answer


def _not_triton(url: str, content: bytes) -> StageError:
    return StageError(
        Problem(url, f"not an answer of Triton: {content[:80]!r}", fix="check host and port")
    )


def _http_error(url: str, error: urllib.error.HTTPError) -> RequestError | StageError:
    try:
        content = error.read().removeprefix(b"data:").strip()
    except (OSError, http.client.HTTPException) as cut:
        return broke_off(url, cut)
    reason = str(_json_object(content, url).get("error", content)) if content else error.reason
    # Server 2.51 answers 400 to every error of a model: the text must tell.
    is_ours = 400 <= error.code < 500 and not is_server_fault(reason)
    kind = RequestError if is_ours else StageError
    return kind(Problem(f"{_host(url)} answers {error.code}", reason))


def _host(url: str) -> str:
    return urlsplit(url).netloc or url
