"""The body of a request, read whole before anybody works with it: within a size, a number of pieces and a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import anyio
from starlette.types import Receive

from oarlock.serve.front.http.refusal import HttpRefusal

# A refused client may still be sending, and most look at the answer only afterwards: so much is let go by first.
_DRAINED_BYTES, _DRAIN_SECONDS = 8 << 20, 2.0
CLOSE = {"Connection": "close"}


class ClientGone(Exception):
    """The client went away before its request was complete."""


def most_pieces(most_bytes: int) -> int:
    """In how many pieces a body may come. Each costs time, however small it is."""
    return 1024 + most_bytes // 256


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Whether there is one to read."""
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def check_length(headers: Mapping[bytes, bytes], most_bytes: int) -> None:
    """Refuse a body that says itself that it is too large.

    Raises:
        HttpRefusal: 413.
    """
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or len(length) > 20:  # the parser of HTTP lets no other through
        raise HttpRefusal(400, "the header Content-Length is not a number", CLOSE)
    if int(length) > most_bytes:
        raise _too_large(most_bytes)


class Body:
    """The body of a request while it arrives."""

    def __init__(self, receive: Receive) -> None:
        """Of the request whose messages these are."""
        self._receive = receive
        self._is_complete = False

    async def read(self, most_bytes: int, seconds: float) -> bytes:
        """All of it.

        Raises:
            HttpRefusal: 413 at the first byte too many, 408 when it takes too long.
            ClientGone: when it does not come to its end.
        """
        with anyio.move_on_after(seconds):
            return await self._read(most_bytes)
        raise HttpRefusal(408, f"the request was not complete after {seconds:g} s", CLOSE)

    async def drain(self) -> None:
        """Let go by what a refused client is still sending, within limits."""
        size = 0
        with contextlib.suppress(ClientGone), anyio.move_on_after(_DRAIN_SECONDS):
            while size <= _DRAINED_BYTES and not self._is_complete:
                size += len(await self._next())

    async def _read(self, most_bytes: int) -> bytes:
        body, left = bytearray(), most_pieces(most_bytes)
        while not self._is_complete:
            body += await self._next()
            if len(body) > most_bytes:
                raise _too_large(most_bytes)
            left -= 1
            if left < 0:
                raise HttpRefusal(413, "the request comes in too many pieces", CLOSE)
        return bytes(body)

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        self._is_complete = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece


def _too_large(most_bytes: int) -> HttpRefusal:
    return HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes", CLOSE)
