"""The inputs of fuzz_http.py over a socket, in pieces; afterwards a plain request must be answered."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import fuzz_http
from harness import Harness

from front_ports import read_to_end, serve_app


def target(data: bytes, folder: Path, ports: list[int]) -> None:
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            with contextlib.suppress(OSError):  # it was answered before it was complete
                for begin in range(0, len(data), 3000):
                    client.sendall(data[begin : begin + 3000])
                client.shutdown(socket.SHUT_WR)
            fuzz_http.check_answers(read_to_end(client), data)


@contextlib.contextmanager
def around() -> Iterator[list[int]]:
    with fuzz_http.around() as ports, contextlib.ExitStack() as stack:
        found = [stack.enter_context(serve_app(server.config.app, ports.config)) for server in ports.servers]
        yield found
        for port in found:
            target(fuzz_http.request("/v2/health/live", method="GET"), Path(), [port])
        assert not ports.complaints, ports.complaints


HARNESS = Harness(target, fuzz_http.seeds, tokens=fuzz_http.HARNESS.tokens, around=around, connects=True)
