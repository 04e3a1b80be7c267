"""TLS for a protocol, with connections counted from their first moment, not from the end of the handshake.

With asyncio's own TLS a protocol learns of a connection when the handshake is over. Until then (a minute) nobody counts
it, and it has buffers of a quarter of a megabyte.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from oarlock.serve.front.admission import Admission, AdmissionRefused, identify_client

HANDSHAKE_SECONDS = 10.0
_MAX, _MAX_PER_CLIENT = 512, 256  # of one port at once; each has a quarter of a megabyte


def count_handshakes() -> Admission:
    return Admission(_MAX, _MAX_PER_CLIENT, "handshakes")


class TlsDoor(asyncio.Protocol):
    """Does the handshake of a connection, then passes it to its protocol."""

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        handshakes: Admission,
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        """Take a connection that was accepted.

        Args:
            make: makes the protocol that gets it, and counts it from then on.
            handshakes: counts it until then.
            seconds: limit for the handshake.
        """
        self._make, self._context, self._handshakes, self._seconds = make, context, handshakes, seconds
        self._early = bytearray()  # data that arrives together with the end of the handshake
        self._is_lost = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake, or end the connection. The reason can't be sent before it is encrypted."""
        peer = identify_client(str((transport.get_extra_info("peername") or ("?",))[0]))
        try:
            self._handshakes.acquire(peer)
        except AdmissionRefused:
            transport.abort()  # type: ignore[attr-defined]
            return
        # Its first step runs before anything is read: reading must be left to start_tls().
        self._task = asyncio.create_task(self._encrypt(transport, peer))

    async def _encrypt(self, transport: Any, peer: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            encrypted: Any = await loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=self._seconds
            )
        except OSError:  # not TLS, too slow, or disconnected
            transport.abort()
            return
        finally:
            self._handshakes.release(peer)
        if encrypted is None or self._is_lost:
            transport.abort()
            return
        protocol = self._make()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        if self._early:
            protocol.data_received(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
