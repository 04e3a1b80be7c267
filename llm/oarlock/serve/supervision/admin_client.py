"""The client of `oarlock admin`: sends an order to a running server. Imports little."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from oarlock.errors import ConfigError, EnvironmentProblem, OarlockError
from oarlock.serve.supervision.run_folder import find_admin_sockets


def find_server(given: Path | None) -> Path:
    """Find the socket of a server: the one that was given, or that of this user's only server.

    Raises:
        ConfigError: when it must be given.
    """
    if given is not None:
        return given
    found = []
    for path in find_admin_sockets():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            found.append(path)
    if not found:
        raise ConfigError("no server of this user runs here; --socket PATH names one (`oarlock serve` prints its path)")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} servers run here; name one: --socket {' or '.join(map(str, found))}")
    return found[0]


def send_order(path: Path, name: str, model: str = "") -> dict[str, Any]:
    """Send an order to a server, and wait until it is done.

    Raises:
        EnvironmentProblem: when it can't be reached.
        OarlockError: the server's error.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(os.fspath(path))
            with contextlib.suppress(BrokenPipeError):  # it may have answered before it has read
                connection.sendall(json.dumps({"do": name, "model": model}).encode() + b"\n")
            content = b""
            while part := connection.recv(1 << 16):
                content += part
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"{path}: no server answers there: {getattr(error, 'strerror', 0) or error}"
        ) from error
    if not content:
        raise EnvironmentProblem(f"{path}: the server did not answer; it handles only a few orders at a time")
    answer: dict[str, Any] = json.loads(content)
    if "error" in answer:
        raise OarlockError(str(answer["error"]))
    return answer
