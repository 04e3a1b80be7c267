"""Accepts the connections of gRPC's clients, and passes each on to the gRPC server over a Unix socket, frame by frame.

http2_frames.py explains why gRPC's own server is not used directly. Connections are also counted here and, if
configured, encrypted.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client
from oarlock.serve.front.grpc.http2_frames import PREFACE, ClientFrames, ServerFrames, Violation, make_window_update
from oarlock.serve.front.http.protocol import set_socket_options
from oarlock.serve.front.http.tls_connections import TlsDoor

_BEGIN_SECONDS = 10.0  # for the TLS handshake, and again for the first bytes of HTTP/2
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class GateOptions:
    """The limits of connections.

    Attributes:
        path: Unix socket of the server behind the gate.
        max_message: bytes.
        message_seconds: from the first to the last byte of a message.
        client_header: header that gives the server the client's address. Its name is a secret.
    """

    path: str
    max_message: int
    message_seconds: float
    client_header: str


class GrpcGate:
    """Accepts connections. To be used in one event loop."""

    def __init__(self, options: GateOptions, connections: Admission, handshakes: Admission) -> None:
        """Count connections with `connections`, and those that are not encrypted yet with `handshakes`."""
        self.options, self.connections, self._handshakes = options, connections, handshakes
        self._servers: list[asyncio.Server] = []
        self.clients: set[ClientSide] = set()
        self._watch: asyncio.Task[None] | None = None

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Accept connections on listening sockets."""
        loop = asyncio.get_running_loop()

        def make_protocol() -> asyncio.Protocol:
            if tls is None:
                return ClientSide(self)
            return TlsDoor(lambda: ClientSide(self), tls, self._handshakes, _BEGIN_SECONDS)

        for listening in sockets:
            self._servers.append(await loop.create_server(make_protocol, sock=listening, backlog=512))
        self._watch = asyncio.create_task(self._end_slow_clients())

    def close(self) -> None:
        """Accept no more connections. Open ones continue."""
        for server in self._servers:
            server.close()

    async def end(self) -> None:
        """End all connections."""
        self.close()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for client in list(self.clients):
            client.end()

    async def _end_slow_clients(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            now = time.monotonic()
            for client in list(self.clients):
                client.check_time(now)


class _Side(asyncio.Protocol):
    """One end of a connection through the gate. Data that arrives here is sent at the other end."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        """Pause the other end, since this one sends slower."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side, when all data has been sent to it."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class ClientSide(_Side):
    """The end towards a client."""

    def __init__(self, gate: GrpcGate) -> None:
        super().__init__()
        self._gate = gate
        self._peer = ""
        self._frames: ClientFrames | None = None
        self._since = time.monotonic()
        self._num_bytes = 0
        self._connecting: asyncio.Task[None] | None = None
        self._early = b""  # data that arrived before the server was connected (with TLS, on Python 3.10)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it, and connect to the server."""
        super().connection_made(transport)
        set_socket_options(transport.get_extra_info("socket"))
        address = str((transport.get_extra_info("peername") or ("?",))[0])
        peer = identify_client(address)
        try:
            self._gate.connections.acquire(peer)
        except AdmissionRefused:
            self.transport.abort()
            return
        self._peer = peer
        options = self._gate.options
        self._frames = ClientFrames(options.max_message, (options.client_header, address[:100]))
        self._gate.clients.add(self)
        self.transport.pause_reading()  # until the server is connected
        self._connecting = asyncio.create_task(self._connect(options.path))

    async def _connect(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, other = await loop.create_unix_connection(lambda: ServerSide(self), path)
        except OSError:
            self.transport.abort()
            return
        self.other = other
        if self.transport.is_closing():
            other.transport.close()
            return
        self.transport.resume_reading()
        early, self._early = self._early, b""
        if early:
            self.data_received(early)

    def data_received(self, data: bytes) -> None:
        """Pass data on to the server."""
        if self.other is None:
            self._early += data
            return
        assert self._frames is not None
        self._num_bytes += len(data)
        try:
            passed = self._frames.feed(data)
        except Violation:
            self.end()
            return
        if passed:
            self.other.transport.write(passed)
        self._update_window()

    def pass_to_client(self, data: bytes, ended: Sequence[int], num_answers: int) -> None:
        """Pass whole frames of the server on to the client."""
        assert self._frames is not None
        self._frames.count_answers(num_answers)
        for stream in ended:
            self._frames.forget(stream)
        self.transport.write(data)
        self._update_window()

    def _update_window(self) -> None:
        assert self._frames is not None and isinstance(self.other, ServerSide)
        if self.other.is_between_frames and (size := self._frames.pop_window()):
            self.transport.write(make_window_update(size))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._peer:
            self._gate.connections.release(self._peer)
            self._peer = ""
        self._gate.clients.discard(self)
        super().connection_lost(exc)

    def check_time(self, now: float) -> None:
        """End the connection if it is too slow."""
        assert self._frames is not None
        oldest = self._frames.find_oldest()
        is_late = self._num_bytes < len(PREFACE) and now - self._since > _BEGIN_SECONDS
        # The server itself answers a little earlier if a call waits for its only message.
        if is_late or (oldest is not None and now - oldest > self._gate.options.message_seconds + 2 * _POLL_SECONDS):
            self.end()

    def end(self) -> None:
        """End the connection at once."""
        self.transport.abort()
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()


class ServerSide(_Side):
    """The end towards the server."""

    def __init__(self, client: ClientSide) -> None:
        super().__init__()
        self.other = self._client = client
        self._frames = ServerFrames()
        self.is_between_frames = False  # until the server's preface

    def data_received(self, data: bytes) -> None:
        """Pass data on to the client."""
        passed, ended = self._frames.feed(data)
        if passed:
            self.is_between_frames = True
            self._client.pass_to_client(passed, ended, self._frames.pop_answers())
