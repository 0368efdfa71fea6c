"""A Hugging Face Hub on loopback: enough of its HTTP for the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class LocalHub:
    """One repository at one commit.

    Attributes:
        kind: "model" or "dataset".
        refuse: status and X-Error-Code of every answer; None: the repository is open.
        break_after: bytes after which the first transfer of a weight file is cut off; None: never.
        ranges: Range headers that were asked for, in order.
    """

    directory: Path
    model_id: str
    revision: str
    url: str = ""
    break_after: int | None = None
    kind: str = "model"
    refuse: tuple[int, str] | None = None
    ranges: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        if hub.refuse is not None:
            self._send(hub.refuse[0], b"{}", {"X-Error-Code": hub.refuse[1]}, body)
            return
        if hub.kind == "dataset":
            path = path.replace("/datasets/", "/", 1)
        if path == f"/api/models/{hub.model_id}/revision/{hub.revision}":
            names = sorted(file.name for file in hub.directory.iterdir())
            siblings = [{"rfilename": name} for name in names]
            info = {"id": hub.model_id, "sha": hub.revision, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {}, body)
            return
        prefix = f"/{hub.model_id}/resolve/{hub.revision}/"
        file = hub.directory / path.removeprefix(prefix)
        if path.startswith(prefix) and file.is_file():
            self._file(file, body)
            return
        code = "RevisionNotFound" if hub.model_id in path else "RepoNotFound"
        if path.startswith(prefix):
            code = "EntryNotFound"
        self._send(404, b"{}", {"X-Error-Code": code}, body)

    def _file(self, file: Path, body: bool) -> None:
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.revision,
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        wanted = self.headers.get("Range")
        if wanted and body:
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = None
        if body and file.suffix == ".safetensors":
            cut, self.hub.break_after = self.hub.break_after, None
        self._send(status, data[start:], headers, body, cut)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        self.close_connection = cut is not None


@contextmanager
def serve_hub(hub: LocalHub) -> Iterator[LocalHub]:
    """Run the hub while the block runs; `hub.url` is what HF_ENDPOINT must be."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
