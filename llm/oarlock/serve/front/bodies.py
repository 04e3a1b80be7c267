"""The body of a request, read whole before anybody works with it: within a size, a number of pieces and a time."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
from starlette.types import Message, Receive

from oarlock.serve.front.refusal import HttpRefusal

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
        raise HttpRefusal(400, "the header Content-Length is no number", CLOSE)
    if int(length) > most_bytes:
        raise _too_large(most_bytes)


async def read_body(receive: Receive, most_bytes: int, seconds: float) -> bytes:
    """All of it.

    Raises:
        HttpRefusal: 413 at the first byte too many, 408 when it takes too long.
        ClientGone: when it does not come to its end.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):  # most come in one piece
        if len(body := message.get("body", b"")) > most_bytes:
            raise _too_large(most_bytes)
        return bytes(body)
    with anyio.move_on_after(seconds):
        return await _read_pieces(message, receive, most_bytes)
    raise HttpRefusal(408, f"the request was not complete after {seconds:g} s", CLOSE)


async def _read_pieces(message: Message, receive: Receive, most_bytes: int) -> bytes:
    body, left = bytearray(), most_pieces(most_bytes)
    while True:
        if message["type"] != "http.request":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > most_bytes:
            raise _too_large(most_bytes)
        if not message.get("more_body", False):
            return bytes(body)
        left -= 1
        if left < 0:
            raise HttpRefusal(413, "the request comes in too many pieces", CLOSE)
        message = await receive()


async def drain(receive: Receive) -> None:
    """Let go by what a refused client is still sending, within limits."""
    size = 0
    with anyio.move_on_after(_DRAIN_SECONDS):
        while size <= _DRAINED_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def _too_large(most_bytes: int) -> HttpRefusal:
    return HttpRefusal(413, f"the request is larger than {most_bytes:,} bytes", CLOSE)
