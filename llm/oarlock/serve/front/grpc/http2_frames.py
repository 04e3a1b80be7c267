"""Reads the HTTP/2 frames of gRPC's clients in transit: limits the length of messages, and adds the client's address.

gRPC's own server reads a whole message before it compares its length with grpc.max_receive_message_length (grpcio
1.67: a message of 600 MB is in memory by then). The first five bytes of a message give its length, so it can be refused
there. (RFC 9113; gRPC over HTTP/2.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Replaces a message that is too long. Nothing follows it in its stream.
TOO_LONG = b"\0"
MAX_FRAME = 16384  # bytes that every end of HTTP/2 has to accept, and the limit that our server announces
_MAX_HEADERS = MAX_FRAME - 256  # bytes of a request's headers
_MAX_REFUSED = 1000  # of one connection
# PING and SETTINGS that the server has not answered. It keeps an answer for each (grpcio 1.67: some kilobytes) until
# the client reads. gRPC's clients wait for the answer to one before they send the next.
_MAX_UNANSWERED = 100
_HEAD, _PREFIX = 9, 5
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_ACK = 1  # of SETTINGS and PING


class Violation(Exception):
    """The client sent frames that no gRPC client sends. The connection ends."""


def make_frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Make a frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def make_window_update(size: int) -> bytes:
    """Make a frame that lets a client send so many more bytes on its connection."""
    return make_frame(_WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big"))


class _Messages:
    """The position in the messages of one stream."""

    __slots__ = ("left", "prefix", "since")

    def __init__(self) -> None:
        self.left, self.prefix = 0, b""
        self.since: float | None = None  # when the current message began


class ClientFrames:
    """Frames from a client to the server."""

    def __init__(self, max_message: int, header: tuple[str, str], now: Callable[[], float] = time.monotonic) -> None:
        """Start a connection.

        Args:
            max_message: bytes.
            header: name and value that are appended to the headers of each call.
        """
        self._max_message, self._now = max_message, now
        name, value = (text.encode("ascii") for text in header)
        # HPACK: a literal that is not indexed, with a new name (RFC 7541, 6.2.2); lengths below 127 are one byte.
        self._header = b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value
        self._buffer = bytearray()
        self._began = False
        self._streams: dict[int, _Messages | None] = {}  # None for one whose message was too long
        self._headers_of, self._headers_size = 0, 0  # the stream whose headers continue in the next frame
        self.num_refused = 0
        self._window = 0  # bytes that the server never sees
        self._num_unanswered = 0

    def feed(self, data: bytes) -> bytes:
        """Read data, and return the bytes for the server.

        Raises:
            Violation: for anything but gRPC over HTTP/2.
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
            out += self._read_frame(bytes(self._buffer[place:end]))
            place = end
        del self._buffer[:place]
        return b"".join(out)

    def pop_window(self) -> int:
        """Bytes since the last call that the server never sees. The client's window must be raised by them."""
        window = max(0, self._window)
        self._window -= window
        return window

    def count_answers(self, count: int) -> None:
        """Count PING and SETTINGS that the server has answered."""
        self._num_unanswered = max(0, self._num_unanswered - count)

    def forget(self, stream: int) -> None:
        """Forget a stream that the server has ended."""
        if self._streams.get(stream, self) is not None:  # more may come of one with a long message
            self._streams.pop(stream, None)

    def find_oldest(self) -> float | None:
        """The start time of the oldest incomplete message; None if there is none."""
        return min((s.since for s in self._streams.values() if s is not None and s.since is not None), default=None)

    def _read_frame(self, whole: bytes) -> Iterator[bytes]:
        kind, flags, stream = whole[3], whole[4], int.from_bytes(whole[5:9], "big") & 0x7FFFFFFF
        if self._headers_of and (kind != _CONTINUATION or stream != self._headers_of):
            raise Violation("headers that do not continue")
        if kind in (_DATA, _HEADERS) and flags & _PADDED:
            raise Violation("padding")
        if kind == _DATA:
            return self._read_data(whole, flags, stream)
        if kind in (_HEADERS, _CONTINUATION):
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
            if flags & _END_HEADERS and stream not in self._streams:
                if not flags & _END_STREAM:
                    self._streams[stream] = _Messages()
                return iter((make_frame(kind, flags, stream, whole[_HEAD:] + self._header),))
        elif kind == _RST_STREAM:
            self._streams.pop(stream, None)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._num_unanswered += 1
            if self._num_unanswered > _MAX_UNANSWERED:
                raise Violation("pings or settings without waiting for answers")
        return iter((whole,))

    def _read_data(self, whole: bytes, flags: int, stream: int) -> Iterator[bytes]:
        if stream in self._streams:
            messages = self._streams[stream]
        else:  # the server has ended it meanwhile
            yield whole
            return
        is_last = bool(flags & _END_STREAM)
        payload = whole[_HEAD:]
        if messages is None:
            self._window += len(payload)
        else:
            held, messages.prefix = messages.prefix, b""
            content = held + payload
            end, is_long = self._find_end(messages, content)
            if is_long:
                self.num_refused += 1
                if self.num_refused > _MAX_REFUSED:
                    raise Violation("long messages, again and again")
                self._streams[stream] = None
                # The client's window was lowered by all of it; the server gets the first bytes and the mark.
                self._window += len(content) - end - _PREFIX - len(TOO_LONG)
                yield from _split_frames(content[:end], stream, False)
                yield make_frame(_DATA, _END_STREAM, stream, b"\0" + len(TOO_LONG).to_bytes(4, "big") + TOO_LONG)
            elif held or end < len(content):
                messages.prefix = b"" if is_last else content[end:]
                yield from _split_frames(content if is_last else content[:end], stream, is_last)
            else:
                yield whole
        if is_last:
            self._streams.pop(stream, None)

    def _find_end(self, messages: _Messages, content: bytes) -> tuple[int, bool]:
        """Find how many bytes can be passed on (all, or those before a prefix), and whether a long message follows."""
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


def _split_frames(content: bytes, stream: int, is_last: bool) -> Iterator[bytes]:
    """Make DATA frames: with a few held bytes, content may no longer fit into one."""
    if not content and not is_last:
        return
    for place in range(0, max(1, len(content)), MAX_FRAME):
        end = is_last and place + MAX_FRAME >= len(content)
        yield make_frame(_DATA, _END_STREAM if end else 0, stream, content[place : place + MAX_FRAME])


class ServerFrames:
    """Frames from the server to a client, cut where other frames may be inserted."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._in_headers = False
        self._num_answers = 0

    def pop_answers(self) -> int:
        """Number of the client's PING and SETTINGS that were answered since the last call."""
        count, self._num_answers = self._num_answers, 0
        return count

    def feed(self, data: bytes) -> tuple[bytes, list[int]]:
        """Read data. Returns frames, cut where others may be inserted, and the streams that end in them."""
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
