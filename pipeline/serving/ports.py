"""The three ports of a Triton server, checked before it starts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import Problem, ToolError


@dataclass(frozen=True)
class Ports:
    """Port numbers, 1 to 65535."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def named(self) -> Iterator[tuple[str, int]]:
        """(config key, port)."""
        yield "serve.http_port", self.http
        yield "serve.grpc_port", self.grpc
        yield "serve.metrics_port", self.metrics


def check_ports(host: str, ports: Ports) -> None:
    """Raise unless a server can listen on all ports of `host`.

    Raises:
        ToolError: every port that is taken, given twice or not ours to open, with its config key.
    """
    problems = []
    seen: dict[int, str] = {}
    for key, port in ports.named():
        if port in seen:
            problems.append(
                Problem(key, f"port {port} is also {seen[port]}", "three different ports")
            )
            continue
        seen[port] = key
        reason = _why_not(host, port)
        if reason:
            problems.append(
                Problem(
                    where=key,
                    what=f"cannot listen on {host}:{port}: {reason}",
                    fix=f"stop the program that has it, or set {key} to a free port",
                )
            )
    if problems:
        raise ToolError(problems)


def free_ports(host: str = "127.0.0.1") -> Ports:
    """Three ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(3)]
    try:
        for one in sockets:
            one.bind((host, 0))
        return Ports(*(one.getsockname()[1] for one in sockets))
    finally:
        for one in sockets:
            one.close()


def _why_not(host: str, port: int) -> str:
    """Why nobody can listen there; empty when one can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            # As the server does: connections of a predecessor that are still closing do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""
