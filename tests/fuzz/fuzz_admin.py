"""The admin socket with arbitrary bytes from a process of the same user: it always answers and runs only valid actions."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from harness import Harness

from oarlock.errors import ConfigError
from oarlock.serve.supervision.admin_socket import AdminServer

MODELS = ("oarlock", "oarlock_infer", "oarlock_json")


class Orders:
    """Administration of a server that only checks names, as the real one does."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.names = ("status", "reload", "load", "unload", "keys")
        self.actions = {name: lambda model, name=name: self.carry_out(name, model) for name in self.names}

    def carry_out(self, name: str, model: str) -> dict[str, str]:
        if name in ("reload", "load", "unload") and model and model not in MODELS:
            raise ConfigError(f"there is no model {model!r} here")
        self.done.append((name, model))
        return {"text": name}


@contextlib.contextmanager
def around() -> Iterator[tuple[AdminServer, Orders]]:
    orders = Orders()
    with tempfile.TemporaryDirectory() as folder, AdminServer(Path(folder) / "admin", orders.actions) as server:
        yield server, orders


def target(data: bytes, folder: Path, served: tuple[AdminServer, Orders]) -> None:
    server, orders = served
    orders.done.clear()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    assert server._places.acquire(timeout=5)  # as for an accepted action
    with here:
        sender = threading.Thread(target=_send, args=(here, data))
        sender.start()
        server._talk(there)
        heard = b""
        with contextlib.suppress(ConnectionError):
            while part := here.recv(1 << 16):
                heard += part
        sender.join()
    answer = json.loads(heard) if heard else {"error": "cut off"}
    assert ("error" in answer) != bool(orders.done), (answer, orders.done)
    assert all(isinstance(value, str) for value in answer.values())


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def seeds() -> list[bytes]:
    orders = [{"do": name} for name in ("status", "keys")]
    orders += [{"do": name, "model": model} for name in ("reload", "load", "unload") for model in (*MODELS, "")]
    return [json.dumps(order).encode() + b"\n" for order in orders]


HARNESS = Harness(
    target,
    seeds,
    tokens=[b'"do"', b'"model"', b"reload", b"../", b"\\u0000", b"\n", b"[" * 80, b'"do": "keys", "do": "load"', b"1e999", b"x" * 5000],
    around=around,
)  # fmt: skip
