"""Downloads from a hub that answers with the input: a complete file in the cache, or an OarlockError."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness import Harness

from oarlock.hub import downloads, http_download
from oarlock.model_config.model_folder import find_model_folder

BETWEEN = b"\n==\n"  # the answers in an input, in the order of the requests; the last one is repeated
INDEX = "model.safetensors.index.json"


class Hub(socketserver.ThreadingTCPServer):
    """Answers each request with the next part of the input, verbatim, and closes the connection."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.parts: list[bytes] = []

    def part(self) -> bytes:
        return self.parts.pop(0) if len(self.parts) > 1 else (self.parts or [b""])[0]


class Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self.rfile.readline(65536).strip():
                pass
            assert isinstance(self.server, Hub)
            self.wfile.write(self.server.part())


def target(data: bytes, folder: Path, hub: Hub) -> None:
    cache = folder / "cache"
    # Not rmtree: it names files relative to descriptors, which looks like a path outside.
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    hub.parts = data.split(BETWEEN)[:40]
    with mock.patch.object(downloads, "_find_cache", lambda: cache):
        found = find_model_folder("some/model", with_weights=True)
    assert found == cache / "some/model"
    for path in found.iterdir():
        assert path.is_file() and not path.is_symlink() and path.parent == found


def block_network(host: Any, *arguments: Any, **named: Any) -> Any:
    """Block name resolution: a redirect in an input must not use the network."""
    if host != "127.0.0.1":
        raise socket.gaierror(f"no {host!r} here")
    return real_addresses(host, *arguments, **named)


real_addresses = socket.getaddrinfo


@contextlib.contextmanager
def around() -> Iterator[Hub]:
    from oarlock.environment.paddle_import import import_paddle

    import_paddle()
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    with (
        mock.patch.dict(os.environ, {"PPNLP_ENDPOINT": address, "NO_PROXY": "*"}),
        mock.patch.object(http_download, "_PAUSE_S", 0),
        mock.patch.object(http_download, "_TIMEOUT_S", (0.5, 0.5)),
        mock.patch.object(socket, "getaddrinfo", block_network),
    ):
        yield hub
    hub.shutdown()
    hub.server_close()


def answer(content: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def seeds() -> list[bytes]:
    config, gone = answer(b'{"model_type": "llama"}'), answer(b"", status="404 Not Found")
    weights = answer(b"weights", 'ETag: "0"')
    index = answer(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode())
    start = [config, config, gone]  # config.json was requested and found; there are no generation settings
    moved = answer(b"", "Location: /elsewhere", status="302 Found")
    cut = weights[:-3]
    rest = answer(b"hts", "Content-Range: bytes 4-6/7", status="206 Partial Content")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nweights\r\n0\r\n\r\n"
    return [
        BETWEEN.join(parts)
        for parts in (
            [*start, index, index, weights, weights, weights, weights],
            [*start, gone, weights, weights],
            [*start, gone, moved, weights, moved, weights],
            [*start, gone, weights, cut, rest],
            [*start, gone, chunked, chunked],
            [gone],
            [moved],
            [answer(b"", status="500 Internal Server Error")],
        )
    ]


TOKENS = [
    b"../../x.safetensors", b"/tmp/x.safetensors", b"http://127.0.0.1/x.safetensors", b"file:///etc/passwd", b"\\u0000",
    b"Location: ", b"Content-Length: ", b"Content-Length: 99999999999999999999\r\n", b"Content-Range: bytes ",
    b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"206 Partial", b"416 Range", b"302 Found",
    b"ETag: ", b"Content-MD5: ", b'"weight_map":', b"ffffffff\r\n", b"-1\r\n", b"\r\n\r\n", BETWEEN, b"HTTP/9.9",
]  # fmt: skip
HARNESS = Harness(target, seeds, tokens=TOKENS, around=around, connects=True)
