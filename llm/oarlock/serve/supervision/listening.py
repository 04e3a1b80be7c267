"""The ports of a server: opened once by the first process, and kept while the front is restarted."""

from __future__ import annotations

import contextlib
import errno
import socket

from oarlock.errors import ConfigError, EnvironmentProblem
from oarlock.serve.config import FrontConfig

_BACKLOG = 1024
_FLAGS = {"openai": "--port", "rest": "--rest-port", "grpc": "--grpc-port", "metrics": "--metrics-port"}


class Listening:
    """The listening sockets of the four ports.

    They listen here and in the front, so that connections wait while the front is restarted.
    """

    def __init__(self, config: FrontConfig) -> None:
        """Open the ports.

        Raises:
            ConfigError: when two are the same.
            EnvironmentProblem: when one is taken, or may not be opened.
        """
        self._sockets: dict[str, list[socket.socket]] = {}
        seen: dict[int, str] = {}
        for name, flag in _FLAGS.items():
            port = getattr(config, f"{name}_port")
            if port in seen:
                raise ConfigError(f"{flag} {port}: {seen[port]} has the same port")
            if not 0 < port < 1 << 16:
                raise ConfigError(f"{flag} {port}: it must be from 1 to 65535")
            seen[port] = flag
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            for name, flag in _FLAGS.items():
                port = getattr(config, f"{name}_port")
                try:
                    self._sockets[name] = open_port(config.host, port)
                except OSError as error:
                    reason = "the port is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
                    raise EnvironmentProblem(f"{flag} {port} on {config.host}: {reason}; give another one") from error
            opened.pop_all()

    @property
    def descriptors(self) -> dict[str, list[int]]:
        """The descriptors of the sockets by the port's name, for the front to inherit."""
        return {name: [one.fileno() for one in found] for name, found in self._sockets.items()}

    def close(self) -> None:
        """Close the sockets here. A front that has them still listens."""
        for found in self._sockets.values():
            for one in found:
                one.close()
        self._sockets.clear()


def open_port(host: str, port: int) -> list[socket.socket]:
    """Open a port on each address of a host."""
    found: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        addresses = [
            (family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ]
        for family, address in dict.fromkeys(addresses):
            made = opened.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
            made.listen(_BACKLOG)
            found.append(made)
        opened.pop_all()
    return found
