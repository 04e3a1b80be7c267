"""Reads the HTTP/2 frames of gRPC's clients as they pass: limits the length of messages, and adds the client's address.

gRPC's own server takes a message in whole before it compares its length with grpc.max_receive_message_length
(grpcio 1.67: a message of 600 MB is in memory by then). The length stands in the first five bytes of a message, so that
it can be refused there. (RFC 9113; gRPC over HTTP/2.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# What the server gets in the place of a message that is too long, after which its stream has no more.
TOO_LONG = b"\0"
MAX_FRAME = 16384  # the least that an end of HTTP/2 has to take, and what the server says that it takes
_MAX_HEADERS = MAX_FRAME - 256  # bytes of a request's headers
_MAX_REFUSED = 1000  # of one connection
# PING and SETTINGS that the server has not answered yet: it keeps an answer for each (grpcio 1.67: some kilobytes), as
# long as the client does not read. Clients of gRPC wait for the answer to one before they send the next.
_MAX_UNANSWERED = 100
_HEAD, _PREFIX = 9, 5
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_ACK = 1  # of SETTINGS and PING


class Violation(Exception):
    """What no client of gRPC sends: the connection ends."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def window_update(size: int) -> bytes:
    """For a connection whose bytes were taken."""
    return frame(_WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big"))


class _Messages:
    """The messages of one stream: where the next begins."""

    __slots__ = ("left", "prefix", "since")

    def __init__(self) -> None:
        self.left, self.prefix = 0, b""
        self.since: float | None = None  # when the one that is on its way began


class ClientFrames:
    """From a client to the server."""

    def __init__(self, max_message: int, header: tuple[str, str], now: Callable[[], float] = time.monotonic) -> None:
        """Of one connection.

        Args:
            max_message: bytes.
            header: name and value that each call gets behind its own ones.
        """
        self._max_message, self._now = max_message, now
        name, value = (text.encode("ascii") for text in header)
        # HPACK: a literal that is not indexed, with a new name (RFC 7541, 6.2.2); lengths below 127 are one byte.
        self._header = b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
        self._buffer = bytearray()
        self._began = False
        self._streams: dict[int, _Messages | None] = {}  # None for one whose message was too long
        self._headers_of, self._headers_size = 0, 0  # the stream whose headers go on in the next frame
        self.num_refused = 0
        self._window = 0  # bytes that the server never sees
        self._num_unanswered = 0

    def feed(self, data: bytes) -> bytes:
        """What goes on to the server.

        Raises:
            Violation: for what is no HTTP/2 of gRPC.
        """
        self._buffer += data
        out: list[bytes] = []
        if not self._began:
            head = bytes(self._buffer[: len(PREFACE)])
            if not PREFACE.startswith(head):
                raise Violation("no HTTP/2")
            if len(head) < len(PREFACE):
                return b""
            self._began = True
            out.append(head)
            del self._buffer[: len(PREFACE)]
        place = 0
        while len(self._buffer) - place >= _HEAD:
            length = int.from_bytes(self._buffer[place : place + 3], "big")
            if length > MAX_FRAME:
                raise Violation(f"a frame of {length:,} bytes")
            end = place + _HEAD + length
            if len(self._buffer) < end:
                break
            out += self._frame(bytes(self._buffer[place:end]))
            place = end
        del self._buffer[:place]
        return b"".join(out)

    def taken(self) -> int:
        """Bytes that the server never sees, since the last call: the client has to be told that there is room again."""
        window = max(0, self._window)
        self._window -= window
        return window

    def note_answers(self, count: int) -> None:
        """So many PING and SETTINGS were answered by the server."""
        self._num_unanswered = max(0, self._num_unanswered - count)

    def forget(self, stream: int) -> None:
        """A stream that the server has ended."""
        if self._streams.get(stream, self) is not None:  # of one with a long message more may come
            self._streams.pop(stream, None)

    def oldest(self) -> float | None:
        """When the message began that is longest on its way; None where none is."""
        return min((s.since for s in self._streams.values() if s is not None and s.since is not None), default=None)

    def _frame(self, whole: bytes) -> Iterator[bytes]:
        kind, flags, stream = whole[3], whole[4], int.from_bytes(whole[5:9], "big") & 0x7FFFFFFF
        if self._headers_of and (kind != _CONTINUATION or stream != self._headers_of):
            raise Violation("headers that do not go on")
        if kind in (_DATA, _HEADERS) and flags & _PADDED:
            raise Violation("padding")
        if kind == _DATA:
            return self._data(whole, flags, stream)
        if kind in (_HEADERS, _CONTINUATION):
            return iter((self._head(whole, kind, flags, stream),))
        if kind == _RST_STREAM:
            self._streams.pop(stream, None)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._num_unanswered += 1
            if self._num_unanswered > _MAX_UNANSWERED:
                raise Violation("pings or settings without waiting for answers")
        return iter((whole,))

    def _head(self, whole: bytes, kind: int, flags: int, stream: int) -> bytes:
        if kind == _CONTINUATION and not self._headers_of:
            raise Violation("headers that never began")
        if kind == _HEADERS:
            if not stream:
                raise Violation("headers of no stream")
            self._headers_size = 0
        self._headers_size += len(whole) - _HEAD
        if self._headers_size > _MAX_HEADERS:
            raise Violation("headers without an end")
        self._headers_of = 0 if flags & _END_HEADERS else stream
        is_new = stream not in self._streams
        if flags & _END_HEADERS and is_new:
            if not flags & _END_STREAM:
                self._streams[stream] = _Messages()
            return frame(kind, flags, stream, whole[_HEAD:] + self._header)
        return whole

    def _data(self, whole: bytes, flags: int, stream: int) -> Iterator[bytes]:
        if stream in self._streams:
            messages = self._streams[stream]
        else:  # it was ended meanwhile; the server knows
            yield whole
            return
        is_last = bool(flags & _END_STREAM)
        payload = whole[_HEAD:]
        if messages is None:
            self._window += len(payload)
        else:
            held, messages.prefix = messages.prefix, b""
            content = held + payload
            end, is_long = self._walk(messages, content)
            if is_long:
                self.num_refused += 1
                if self.num_refused > _MAX_REFUSED:
                    raise Violation("long messages, again and again")
                self._streams[stream] = None
                # Of the bytes that the client's window was lowered by, the server gets the first ones and the mark.
                self._window += len(content) - end - _PREFIX - len(TOO_LONG)
                yield from _pieces(content[:end], stream, False)
                yield frame(_DATA, _END_STREAM, stream, b"\0" + len(TOO_LONG).to_bytes(4, "big") + TOO_LONG)
            elif held or end < len(content):
                messages.prefix = b"" if is_last else content[end:]
                yield from _pieces(content if is_last else content[:end], stream, is_last)
            else:
                yield whole
        if is_last:
            self._streams.pop(stream, None)

    def _walk(self, messages: _Messages, content: bytes) -> tuple[int, bool]:
        """Up to where the bytes can go on: the end, or the beginning of a prefix; whether that is of a long message."""
        place = 0
        while place < len(content):
            if messages.left:
                taken = min(messages.left, len(content) - place)
                messages.left -= taken
                place += taken
            elif len(content) - place < _PREFIX:
                messages.since = messages.since or self._now()
                return place, False
            else:
                messages.left = int.from_bytes(content[place + 1 : place + _PREFIX], "big")
                if messages.left > self._max_message:
                    return place, True
                place += _PREFIX
                messages.since = self._now()
            if not messages.left:
                messages.since = None
        return place, False


def _pieces(content: bytes, stream: int, is_last: bool) -> Iterator[bytes]:
    """DATA frames, which a few held bytes may have made one too many for."""
    if not content and not is_last:
        return
    for place in range(0, max(1, len(content)), MAX_FRAME):
        end = is_last and place + MAX_FRAME >= len(content)
        yield frame(_DATA, _END_STREAM if end else 0, stream, content[place : place + MAX_FRAME])


class ServerFrames:
    """From the server to a client: what passes, cut where something may be put in between."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._in_headers = False
        self._num_answers = 0

    def answers(self) -> int:
        """PING and SETTINGS of the client's that were answered since the last call."""
        count, self._num_answers = self._num_answers, 0
        return count

    def feed(self, data: bytes) -> tuple[bytes, list[int]]:
        """Whole frames, up to the last place where another may stand, and the streams that end in them."""
        self._buffer += data
        place = end = 0
        ended: list[int] = []
        held: list[int] = []
        while len(self._buffer) - place >= _HEAD:
            after = place + _HEAD + int.from_bytes(self._buffer[place : place + 3], "big")
            if len(self._buffer) < after:
                break
            kind, flags = self._buffer[place + 3], self._buffer[place + 4]
            if (kind in (_DATA, _HEADERS) and flags & _END_STREAM) or kind == _RST_STREAM:
                held.append(int.from_bytes(self._buffer[place + 5 : place + 9], "big") & 0x7FFFFFFF)
            if kind in (_HEADERS, _CONTINUATION):
                self._in_headers = not flags & _END_HEADERS
            elif kind in (_SETTINGS, _PING) and flags & _ACK:
                self._num_answers += 1
            place = after
            if not self._in_headers:
                end = place
                ended += held
                held.clear()
        out = bytes(self._buffer[:end])
        del self._buffer[:end]
        return out, ended
