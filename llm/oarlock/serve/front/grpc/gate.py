"""Accepts the connections of gRPC's clients, and passes each on to the gRPC server over a Unix socket, frame by frame.

See http2_frames.py for why gRPC's own server does not stand here. Connections are counted and, where asked for,
encrypted here too.
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

from oarlock.serve.front.admission import Admission, Refused, client_of
from oarlock.serve.front.grpc.http2_frames import PREFACE, ClientFrames, ServerFrames, Violation, window_update
from oarlock.serve.front.http.protocol import set_socket_options
from oarlock.serve.front.http.tls_connections import TlsDoor

_BEGIN_SECONDS = 10.0  # for the encryption, and again for the first bytes of HTTP/2
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class GateOptions:
    """The limits of connections.

    Attributes:
        path: Unix socket of the server behind.
        max_message: bytes.
        message_seconds: from the first to the last byte of one.
        client_header: by which the server is told the client's address. Its name is a secret.
    """

    path: str
    max_message: int
    message_seconds: float
    client_header: str


class GrpcGate:
    """Accepts connections; everything here belongs to one event loop."""

    def __init__(self, options: GateOptions, connections: Admission, handshakes: Admission) -> None:
        """A gate that counts its connections, and those that are not encrypted yet."""
        self.options, self.connections, self._handshakes = options, connections, handshakes
        self._servers: list[asyncio.Server] = []
        self.clients: set[ClientSide] = set()
        self._watch: asyncio.Task[None] | None = None

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Accept connections on listening sockets."""
        loop = asyncio.get_running_loop()

        def client() -> asyncio.Protocol:
            return ClientSide(self)

        def door() -> asyncio.Protocol:
            return client() if tls is None else TlsDoor(client, tls, self._handshakes, _BEGIN_SECONDS)

        for listening in sockets:
            self._servers.append(await loop.create_server(door, sock=listening, backlog=512))
        self._watch = asyncio.create_task(self._cut_the_slow())

    def close(self) -> None:
        """Accept no more connections; those that are open go on."""
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

    async def _cut_the_slow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            for client in list(self.clients):
                client.look(now)


class _Side(asyncio.Protocol):
    """One end of a connection through the gate; what comes in here goes out at the other end."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = transport

    def pause_writing(self) -> None:
        """This end takes less than comes: the other one has to wait."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """This end takes data again."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side, after what was written to it is sent."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class ClientSide(_Side):
    """The end towards a client."""

    def __init__(self, gate: GrpcGate) -> None:
        """A connection that was accepted."""
        super().__init__()
        self._gate = gate
        self._peer = ""
        self._frames: ClientFrames | None = None
        self._since = time.monotonic()
        self._num_bytes = 0
        self._connecting: asyncio.Task[None] | None = None
        self._early = b""  # what came before there was a server to write to (with TLS, on Python 3.10)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it, and connect to the server."""
        super().connection_made(transport)
        set_socket_options(transport.get_extra_info("socket"))
        address = str((transport.get_extra_info("peername") or ("?",))[0])
        peer = client_of(address)
        try:
            self._gate.connections.take(peer)
        except Refused:
            self.transport.abort()
            return
        self._peer = peer
        options = self._gate.options
        self._frames = ClientFrames(options.max_message, (options.client_header, address[:100]))
        self._gate.clients.add(self)
        self.transport.pause_reading()  # until there is somebody to read for
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
        self._tell_taken()

    def from_server(self, data: bytes, ended: Sequence[int], num_answers: int) -> None:
        """Pass whole frames of the server on to the client."""
        assert self._frames is not None
        self._frames.note_answers(num_answers)
        for stream in ended:
            self._frames.forget(stream)
        self.transport.write(data)
        self._tell_taken()

    def _tell_taken(self) -> None:
        assert self._frames is not None and isinstance(self.other, ServerSide)
        if self.other.is_between_frames and (size := self._frames.taken()):
            self.transport.write(window_update(size))

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the connection out of the count."""
        if self._peer:
            self._gate.connections.leave(self._peer)
            self._peer = ""
        self._gate.clients.discard(self)
        super().connection_lost(exc)

    def look(self, now: float) -> None:
        """End the connection if it is too slow."""
        assert self._frames is not None
        oldest = self._frames.oldest()
        is_late = self._num_bytes < len(PREFACE) and now - self._since > _BEGIN_SECONDS
        # The server itself says so a little earlier where a call waits for its only message.
        if is_late or (oldest is not None and now - oldest > self._gate.options.message_seconds + 2 * _LOOK_SECONDS):
            self.end()

    def end(self) -> None:
        """End the connection at once."""
        self.transport.abort()
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()


class ServerSide(_Side):
    """The end towards the server."""

    def __init__(self, client: ClientSide) -> None:
        """The server's end for one client."""
        super().__init__()
        self.other = self._client = client
        self._frames = ServerFrames()
        self.is_between_frames = False  # until the server's preface

    def data_received(self, data: bytes) -> None:
        """Pass data on to the client."""
        passed, ended = self._frames.feed(data)
        if passed:
            self.is_between_frames = True
            self._client.from_server(passed, ended, self._frames.answers())
