"""HTTP ports of the front in this process, and clients that write arbitrary bytes to a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator

from oarlock.serve.config import EngineConfig, FrontConfig, ServeConfig
from oarlock.serve.front.http.server import make_http_server

GUARD_S = 60  # only guards against hanging


def configure(max_body=EngineConfig.max_body, **front) -> ServeConfig:
    """A configuration with fields of the front and of the engine."""
    return ServeConfig(EngineConfig(max_body=max_body), front=FrontConfig(**front))


OPTIONS = configure()


@contextlib.contextmanager
def serve_app(app, options=OPTIONS, **limits) -> Iterator[int]:
    """Serve an application on a port of this machine."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = make_http_server(app, options, 0, **limits)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        listening.listen(64)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(GUARD_S)


def exchange_bytes(port: int, *pieces: bytes, end: bool = False) -> bytes:
    """Send bytes, and return everything the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client:
        for piece in pieces:
            try:
                client.sendall(piece)
            except OSError:
                break
        if end:
            client.shutdown(socket.SHUT_WR)
        return read_to_end(client)


def read_to_end(client: socket.socket) -> bytes:
    """Read until the connection is closed."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            found += piece
    return found


def make_head(path="/x", method="POST", host="localhost", version="1.1", **headers) -> bytes:
    """The headers of a request that closes the connection."""
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read_status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def read_content(answer: bytes):
    return json.loads(answer.partition(b"\r\n\r\n")[2])
