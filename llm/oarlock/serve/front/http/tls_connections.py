"""What stands before a protocol with TLS: a connection is counted from its first moment, not from its encryption on.

asyncio's own listening with TLS makes a protocol known of a connection when that is encrypted. Until then (a minute)
nobody counts it, and it has buffers of a quarter of a megabyte.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from oarlock.serve.front.admission import Admission, Refused, client_of

HANDSHAKE_SECONDS = 10.0
_MOST, _MOST_OF_A_CLIENT = 512, 256  # of one port at once; each has a quarter of a megabyte


def count_handshakes() -> Admission:
    """What counts those of a port."""
    return Admission(_MOST, _MOST_OF_A_CLIENT, "handshakes")


class TlsDoor(asyncio.Protocol):
    """Encrypts a connection, then hands it over."""

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        handshakes: Admission,
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        """For a connection that was accepted.

        Args:
            make: the protocol that gets it, which counts it from then on.
            handshakes: counts it until then.
            seconds: that encryption may take.
        """
        self._make, self._context, self._handshakes, self._seconds = make, context, handshakes, seconds
        self._early = bytearray()  # comes in one piece with the end of the handshake
        self._is_lost = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take it, or end it: there is no way to say why before it is encrypted."""
        peer = client_of(str((transport.get_extra_info("peername") or ("?",))[0]))
        try:
            self._handshakes.take(peer)
        except Refused:
            transport.abort()  # type: ignore[attr-defined]
            return
        # Its first step comes before anything is read: reading has to be left to start_tls().
        self._task = asyncio.create_task(self._encrypt(transport, peer))

    async def _encrypt(self, transport: Any, peer: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            encrypted: Any = await loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=self._seconds
            )
        except OSError:  # no TLS, too slow, or gone
            transport.abort()
            return
        finally:
            self._handshakes.leave(peer)
        if encrypted is None or self._is_lost:
            transport.abort()
            return
        protocol = self._make()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        if self._early:
            protocol.data_received(bytes(self._early))

    def data_received(self, data: bytes) -> None:
        """Until there is somebody to take it."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        """Before it was handed over."""
        self._is_lost = True
