"""Reads the whole body of a request, within limits of size, number of pieces and time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import anyio
from starlette.types import Receive

from oarlock.serve.front.http.refusal import HttpRefusal

# A refused client may still be sending, and most clients read the answer only afterwards. So much is discarded first.
_DRAIN_BYTES, _DRAIN_SECONDS = 8 << 20, 2.0
CLOSE = {"Connection": "close"}


class ClientDisconnected(Exception):
    """The client disconnected before its request was complete."""


def limit_pieces(most_bytes: int) -> int:
    """The most pieces in which a body may arrive. Each costs time, however small it is."""
    return 1024 + most_bytes // 256


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def check_length(headers: Mapping[bytes, bytes], most_bytes: int) -> None:
    """Refuse a body whose Content-Length is too large.

    Raises:
        HttpRefusal: 413.
    """
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 20:  # the HTTP parser accepts no others
        raise HttpRefusal(400, "the header Content-Length is not a number", CLOSE)
    if int(length) > most_bytes:
        raise HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes", CLOSE)


class Body:
    """The body of a request while it arrives."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_complete = False

    async def read(self, most_bytes: int, seconds: float) -> bytes:
        """Read the whole body.

        Raises:
            HttpRefusal: 413 at the first byte too many, 408 when it takes too long.
            ClientDisconnected: when its end does not arrive.
        """
        with anyio.move_on_after(seconds):
            return await self._read(most_bytes)
        raise HttpRefusal(408, f"the request was not complete after {seconds:g} s", CLOSE)

    async def drain(self) -> None:
        """Discard what a refused client is still sending, within limits."""
        size = 0
        with contextlib.suppress(ClientDisconnected), anyio.move_on_after(_DRAIN_SECONDS):
            while size <= _DRAIN_BYTES and not self._is_complete:
                size += len(await self._receive_piece())

    async def _read(self, most_bytes: int) -> bytes:
        body, left = bytearray(), limit_pieces(most_bytes)
        while not self._is_complete:
            body += await self._receive_piece()
            if len(body) > most_bytes:
                raise HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes", CLOSE)
            left -= 1
            if left < 0:
                raise HttpRefusal(413, "the request comes in too many pieces", CLOSE)
        return bytes(body)

    async def _receive_piece(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientDisconnected
        self._is_complete = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece
