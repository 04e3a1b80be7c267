"""Limits of HTTP connections that ASGI does not see: how many, how slow, in how small pieces (uvicorn 0.54)."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client

MAX_HEAD_BYTES = 64 << 10  # of an incomplete head that the parser holds
# The kernel gives up clients that read nothing, or have silently disappeared.
_GONE_SECONDS = 60
_KEEP_ALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


def make_plain_error(status: int, message: str) -> bytes:
    """An error as Triton writes it."""
    return json.dumps({"error": message}).encode()


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a port's connections.

    Attributes:
        connections: counts the open ones.
        max_pieces: in which a body may arrive.
        head_seconds: from the opening, or the first byte of a further request, to the end of its head.
        write_seconds: in which a client has to read what is sent to it, 64 KiB at a time.
        error_body: writes (status, message) as the port's JSON.
    """

    connections: Admission
    max_pieces: int
    head_seconds: float = 10.0
    write_seconds: float = 30.0
    error_body: Callable[[int, str], bytes] = make_plain_error


class _BoundedConnection(h11.Connection):
    """Counts the pieces of a body. A chunk of one byte costs as much time as one of thousands."""

    def __init__(self, max_pieces: int) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._max_pieces, self._pieces = max_pieces, 0
        self.refusal: tuple[int, str] = (400, "no valid HTTP")

    def next_event(self) -> Any:
        """The next event of the parser.

        Raises:
            h11.RemoteProtocolError: for what is not HTTP, or too much; `refusal` has the answer.
        """
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint, f"not valid HTTP: {error}"
            raise
        if type(event) is h11.Data:
            self._pieces += 1
            if self._pieces > self._max_pieces:
                self.refusal = 413, "the request comes in too many pieces"
                raise h11.RemoteProtocolError(self.refusal[1], error_status_hint=413)
        elif type(event) is h11.Request:
            self._pieces = 0
        return event


class FrontProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        """Make the protocol as uvicorn does, with limits."""
        super().__init__(config, server_state, app_state, _loop)
        self.conn: _BoundedConnection = _BoundedConnection(limits.max_pieces)
        self._limits = limits
        self._peer = ""  # of a connection that is counted
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # opening and closing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection, or answer that there are too many."""
        super().connection_made(transport)
        peer = identify_client(self.client[0]) if self.client else "?"
        try:
            self._limits.connections.acquire(peer)
        except AdmissionRefused as error:
            self._end_with(503 if error.is_closing else 429, str(error), retry_after=error.retry_after)
            return
        self._peer = peer
        set_socket_options(transport.get_extra_info("socket"))
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._peer:
            self._limits.connections.release(self._peer)
            self._peer = ""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    # reading

    def data_received(self, data: bytes) -> None:
        """Read data. The time for a head starts with its first byte."""
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        self._end_with(408, f"the head of the request was not complete after {self._limits.head_seconds:g} s")

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        status, message = self.conn.refusal
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end_with(status, message)
        else:
            self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _should_upgrade(self) -> bool:
        return False  # without uvicorn's warning

    # writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Read the next request, or wait until the client has read its last answer."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()
        elif self.conn.trailing_data[0]:  # the beginning of a further request arrived with the last one
            self._watch_head()

    def _abort_later(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _end_with(self, status: int, message: str, retry_after: int = 0) -> None:
        if self.transport.is_closing():
            return
        body = self._limits.error_body(status, message)
        retry = f"Retry-After: {retry_after}\r\n" if retry_after else ""
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n{retry}"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
        self._abort_later()


def set_socket_options(connection: socket.socket | None) -> None:
    """Send without delay, and give up clients that read nothing or have silently disappeared."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        # asyncio does so itself only if the listening socket names its protocol. Otherwise an answer of two writes
        # waits 40 ms for the client's system.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (*_KEEP_ALIVE, ("TCP_USER_TIMEOUT", _GONE_SECONDS * 1000)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError as error:  # the client has disconnected
        logging.getLogger(__name__).debug("socket options: %s", error)
