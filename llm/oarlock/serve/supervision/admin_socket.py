"""The administration socket of a server: a Unix socket that only its own user (and root) may use.

A client sends a line of JSON, {"do": NAME, "model": NAME}, and gets one: the result of the action, or {"error": TEXT}.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import NotRequired, TypedDict

from oarlock.environment.processes import find_peer
from oarlock.errors import ConfigError, OarlockError
from oarlock.formats.json_file import parse_json

_OTHER_USER = {"error": "this server takes orders only from its own user"}
Action = Callable[[str], Mapping[str, Any]]
_MAX_BYTES, _MAX_CLIENTS, _SECONDS = 4096, 8, 5.0


class AdminServer:
    """Threads that wait for orders and carry them out."""

    def __init__(self, path: Path, actions: Mapping[str, Action]) -> None:
        """Prepare a socket at `path`, which must not exist."""
        self._path, self._actions = path, actions
        self._places = threading.BoundedSemaphore(_MAX_CLIENTS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> AdminServer:
        self._socket.bind(str(self._path))  # in a folder of mode 0700
        os.chmod(self._path, 0o600)
        self._socket.listen(_MAX_CLIENTS)
        threading.Thread(target=self._accept, name="admin", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes the thread that waits
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._talk, args=(connection,), name="admin-client", daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_SECONDS)
                is_known, line = find_peer(connection).user in (0, os.geteuid()), b""
                while b"\n" not in line and len(line) <= _MAX_BYTES and (part := connection.recv(_MAX_BYTES)):
                    line += part
                answer = self.answer(line) if is_known else _OTHER_USER
                connection.sendall(json.dumps(answer).encode() + b"\n")
        finally:
            self._places.release()

    def answer(self, line: bytes) -> Mapping[str, Any]:
        """Answer a line of a client, whatever it holds."""
        try:
            order = parse_json(line, "order", _Order, error=ConfigError, limit=_MAX_BYTES, depth=2, extra="forbid")
            name = order["do"]
            if name not in self._actions:
                return {"error": f"there is no {name!r} (there are: {', '.join(self._actions)})"}
            return self._actions[name](order.get("model", ""))
        except OarlockError as error:
            return {"error": str(error)}
        except Exception as error:  # whatever it is, the server continues
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


class _Order(TypedDict):
    do: str
    model: NotRequired[str]
