"""An HTTP port: uvicorn with the limits of this server, and the guard in front of an application."""

from __future__ import annotations

import contextlib
import functools
import resource
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from oarlock.serve.config import ServeConfig
from oarlock.serve.front.admission import Admission
from oarlock.serve.front.http.bodies import limit_pieces
from oarlock.serve.front.http.guard import ErrorResponse, Guard, GuardRules
from oarlock.serve.front.http.heads import HeadRules, is_everywhere, list_server_names
from oarlock.serve.front.http.protocol import MAX_HEAD_BYTES, ConnectionLimits, FrontProtocol, make_plain_error
from oarlock.serve.front.http.tls_connections import TlsDoor, count_handshakes
from oarlock.serve.front.keys import Keys

_KEEP_ALIVE_SECONDS = 5  # between two requests of a connection
_OTHER_DESCRIPTORS = 128  # needed by this process besides its connections
_BACKLOG = 512


class HttpServer(uvicorn.Server):
    """One port of several in one event loop. It leaves signals alone, and ends when `should_exit` is set."""

    def __init__(self, config: uvicorn.Config, handshakes: Admission) -> None:
        """Args: handshakes: counts connections that are not encrypted yet."""
        super().__init__(config)
        self._handshakes = handshakes

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. With TLS, connections are counted from their first moment."""
        context, make = self.config.ssl, self.config.http_protocol_class
        if context is not None:
            self.config.ssl = None

            def door(**options: Any) -> TlsDoor:
                return TlsDoor(functools.partial(make, **options), context, self._handshakes)

            self.config.http_protocol_class = door  # type: ignore[assignment]
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def guard_app(
    app: ASGIApp,
    config: ServeConfig,
    keys: Keys,
    admission: Admission,
    error_response: ErrorResponse,
    *,
    open_paths: Collection[str] = (),
    takes_binary: bool = False,
    encodings: Collection[bytes] = (),
) -> Guard:
    """Put the guard of its port in front of an application.

    Args:
        error_response: writes (status, message, headers) as the port's clients read errors.
        open_paths: paths that need neither key nor slot, for probes.
        takes_binary: bodies may hold KServe's binary tensors.
        encodings: of bodies that the application unpacks.
    """
    head = HeadRules(
        names=list_server_names(config.front.host, config.front.allowed_hosts),
        is_everywhere=is_everywhere(config.front.host),
        origins=frozenset(config.front.cors_origins),
        takes_binary=takes_binary,
        encodings=tuple(encodings),
    )
    rules = GuardRules(head, config.engine.max_body, config.front.body_seconds, tuple(open_paths))
    return Guard(app, rules, keys, admission, error_response)


def make_http_server(
    app: ASGIApp,
    config: ServeConfig,
    port: int,
    *,
    error_body: Callable[[int, str], bytes] = make_plain_error,
    lifespan: bool = False,
    head_seconds: float = 10.0,
    write_seconds: float = 30.0,
) -> HttpServer:
    """Make a server for `await server.serve(sockets)`. With `sockets` None it opens the port itself.

    Args:
        error_body: JSON of (status, message), for what is refused before there is a request.
        lifespan: whether the application has work at its start and end.
        head_seconds, write_seconds: limits, as in ConnectionLimits.
    """
    most = limit_connections(config.front.max_connections)
    connections = Admission(most, max(1, most // 2), "connections")
    pieces = limit_pieces(config.engine.max_body)
    limits = ConnectionLimits(connections, pieces, head_seconds, write_seconds, error_body)
    protocol: Any = functools.partial(FrontProtocol, limits=limits)
    settings = uvicorn.Config(
        app,
        host=config.front.host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="on" if lifespan else "off",
        log_level="error",  # errors of clients are not worth a line each
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could write any address into them
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        backlog=_BACKLOG,
        ssl_certfile=config.front.tls_certificate or None,
        ssl_keyfile=config.front.tls_key or None,
    )
    return HttpServer(settings, count_handshakes())


def limit_connections(wanted: int) -> int:
    """Limit the connections of a port to what the descriptors of this process allow.

    The process gets all descriptors that the system allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return wanted
    # One for each connection of the three HTTP ports, three for each of gRPC's.
    return max(1, min(wanted, (soft - _OTHER_DESCRIPTORS) // 6))
