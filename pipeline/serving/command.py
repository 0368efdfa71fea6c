"""The verbs `serve` and `client`: the server and the client, with what a person wants to read."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ServeConfig
from pipeline.errors import Problem, StageError
from pipeline.serving.client import AskOptions, Protocol, ask, decode_text
from pipeline.serving.ports import Ports
from pipeline.serving.server import TritonServer, serve_until_stopped

_EXAMPLE_PROMPT = "def main(argv):"


def serve(repository_dir: Path, model_name: str, config: ServeConfig, *, as_json: bool) -> None:
    """Serve a published repository until Ctrl-C; URLs and examples are printed once it has answered.

    Raises:
        ToolError: a port is taken, or tritonserver is missing.
        StageError: the server could not load the model, or ended by itself.
    """
    if not (repository_dir / model_name / "config.pbtxt").is_file():
        fix = f"trtpipe serve triton_repo/{repository_dir.name}"
        what = f"is no model repository with a model {model_name!r}"
        raise StageError(Problem(str(repository_dir), what, fix=fix))
    ports = Ports(config.http_port, config.grpc_port, config.metrics_port)
    log_path = repository_dir.parent / ".logs" / f"{repository_dir.name}.log"
    log_path.parent.mkdir(exist_ok=True)
    server = TritonServer(
        repository_dir, model_name, ports=ports, host=config.host, log_path=log_path
    )
    print(f"starting tritonserver on {repository_dir}, log {log_path} ...", file=sys.stderr)

    def on_ready() -> None:
        text = json.dumps(_urls(server)) if as_json else _examples(server)
        print(text, flush=True)

    serve_until_stopped(server, on_ready)
    with contextlib.suppress(OSError):  # the terminal may be gone: that stops a server, too
        print("stopped", file=sys.stderr)


def ask_and_print(
    prompt: bytes,
    model_name: str,
    config: ServeConfig,
    *,
    protocol: Protocol,
    options: AskOptions,
    stream: bool,
    as_json: bool,
) -> None:
    """Ask one prompt; text goes to standard output as it arrives, or one JSON document at the end.

    Raises:
        ToolError: no server answers.
        RequestError: the prompt is not UTF-8, or the server found the request wrong.
        StageError: the server failed, or the answer broke off.
    """
    asked = decode_text("prompt", prompt)
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = (
        f"http://{host}:{config.http_port}" if protocol == "http" else f"{host}:{config.grpc_port}"
    )
    text, last = "", None
    for piece in ask(url, protocol, asked, model=model_name, options=options, stream=stream):
        text, last = text + piece.text, piece
        if not as_json:
            print(piece.text, end="", flush=True)
    assert last is not None, "ask has raised if there was no piece"
    facts = {
        "finish_reason": last.finish_reason,
        "num_input_tokens": last.num_input_tokens,
        "num_output_tokens": last.num_output_tokens,
    }
    if as_json:
        print(json.dumps({"text": text, **facts}))
        return
    print()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), file=sys.stderr)


def _urls(server: TritonServer) -> dict[str, str]:
    model_url = f"{server.http_url}/v2/models/{server.model_name}"
    return {
        "model": server.model_name,
        "generate": f"{model_url}/generate",
        "generate_stream": f"{model_url}/generate_stream",
        "grpc": server.grpc_url,
        "metrics": server.metrics_url,
    }


def _examples(server: TritonServer) -> str:
    urls = _urls(server)
    lines: Sequence[str] = (
        f"{server.model_name} answers. Ctrl-C stops it.",
        *(f"  {name:<16} {url}" for name, url in urls.items() if name != "model"),
        "",
        f"curl -s {urls['generate']} \\",
        f"""  -d '{{"text_input": "{_EXAMPLE_PROMPT}", "max_tokens": 40}}'""",
        "",
        "from pipeline.serving.client import ask",
        f'for piece in ask("{urls["grpc"]}", "grpc", "{_EXAMPLE_PROMPT}", '
        f'model="{server.model_name}", stream=True):',
        '    print(piece.text, end="", flush=True)',
    )
    return "\n".join(lines)
