"""Messages between two ranks of one launch over a Unix socket: frames of fixed size, signed with the launch's key.

A frame may carry a file descriptor. The kernel, not the frame, says which process and user sent it.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
from enum import IntEnum
from typing import NamedTuple

from oarlock.errors import OarlockError, StoppedWithOthers

MAX_RANKS = 1 << 16

# Magic, kind, rank, ranks in all, process, start time, bytes of memory, the sender's nonce. The signature follows.
_BODY = struct.Struct("<7sBIIIQQ32s")
_MAGIC = b"oarlock"
_SIGNATURE_BYTES = 32
FRAME_BYTES = _BODY.size + _SIGNATURE_BYTES
_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group
_ANCILLARY_BYTES = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_CREDENTIALS.size)


class FrameKind(IntEnum):
    """The purpose of a message, in the order of sending. STOP may come at any time."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    MEMBER = 4
    TAKEN = 5
    GO = 6
    STOP = 7


class UntrustedPeer(OarlockError):
    """A message is not from a rank of this launch."""


class ConnectionClosed(OarlockError):
    """The other side has closed the connection, or does not answer."""


class Frame(NamedTuple):
    """The content of a message. Fields that its kind does not use are 0."""

    kind: int
    rank: int = 0
    world_size: int = 0
    pid: int = 0
    started: int = 0
    nbytes: int = 0


def unpack_frame(data: bytes) -> tuple[Frame, bytes]:
    """Parse a frame and its sender's nonce. The signature is not checked.

    Raises:
        UntrustedPeer: the data is not a frame.
    """
    if len(data) != FRAME_BYTES:
        raise UntrustedPeer(f"a message of {len(data):,} bytes, not {FRAME_BYTES}")
    magic, kind, rank, world_size, pid, started, nbytes, nonce = _BODY.unpack(data[: _BODY.size])
    if magic != _MAGIC or not FrameKind.HELLO <= kind <= FrameKind.STOP:
        raise UntrustedPeer("a message of an unknown kind")
    if not 1 < world_size <= MAX_RANKS or rank >= world_size:
        raise UntrustedPeer(f"a message of rank {rank} of {world_size}")
    return Frame(kind, rank, world_size, pid, started, nbytes), nonce


class Channel:
    """A connection between rank 0 and another rank.

    Args:
        key: the launch's secret.
        is_first: this side is rank 0.

    Attributes:
        pid: the process of the other side, 0 before its first message.
    """

    def __init__(self, connection: socket.socket, key: bytes, is_first: bool) -> None:
        self.socket, self._key = connection, key
        self._me, self._other = (b"first", b"other") if is_first else (b"other", b"first")
        self._nonce, self._others_nonce = os.urandom(32), b""
        self.pid = 0
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self.socket.fileno()

    def close(self) -> None:
        """Close the connection. The other side gets ConnectionClosed."""
        self.socket.close()

    def send(self, frame: Frame, descriptor: int | None = None) -> None:
        """Send a frame, optionally with a descriptor.

        Raises:
            ConnectionClosed: the other side is gone.
        """
        body = _BODY.pack(_MAGIC, *frame, self._nonce)
        signature = self._sign(self._me, b"" if frame.kind == FrameKind.HELLO else self._others_nonce, body)
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))] if descriptor is not None else []
        )
        try:
            self.socket.sendmsg([body + signature], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ConnectionClosed(f"a rank could not be reached ({error.strerror or error})") from error

    def receive(self, *kinds: int) -> tuple[Frame, int | None]:
        """Receive the next frame, which must be of one of these kinds, and its descriptor, which the caller must close.

        Raises:
            UntrustedPeer: the message is not from a rank of this launch.
            ConnectionClosed: the other side has closed the connection, or sends nothing before the socket's timeout.
            StoppedWithOthers: the other side sends STOP.
        """
        data, descriptors = self._receive()
        try:
            frame, nonce = unpack_frame(data)
            mine = b"" if frame.kind == FrameKind.HELLO else self._nonce
            signature = self._sign(self._other, mine, data[: _BODY.size])
            if not hmac.compare_digest(signature, data[_BODY.size :]):
                raise UntrustedPeer("a message without the key of this launch")
            if nonce != (self._others_nonce or nonce) or frame.kind not in (*kinds, FrameKind.STOP):
                raise UntrustedPeer("a message out of turn")
            if len(descriptors) != (frame.kind in (FrameKind.PROOF, FrameKind.MEMBER)):
                raise UntrustedPeer(f"a message with {len(descriptors)} descriptors")
        except UntrustedPeer:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        self._others_nonce = nonce
        if frame.kind == FrameKind.STOP:
            raise StoppedWithOthers("another rank reports why the run can't start")
        return frame, descriptors[0] if descriptors else None

    def _sign(self, sender: bytes, receivers_nonce: bytes, body: bytes) -> bytes:
        return hmac.digest(self._key, b"%s %b %b" % (sender, receivers_nonce.hex().encode(), body), "sha256")

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            data, ancillary, flags, _ = self.socket.recvmsg(FRAME_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ConnectionClosed(f"a rank does not answer ({error.strerror or error})") from error
        descriptors: list[int] = []
        sender = (0, -1)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[:2]
        problem: OarlockError | None = None
        if not data:
            problem = ConnectionClosed("a rank has closed its connection")
        elif flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            problem = UntrustedPeer("a message that is too long")
        elif sender[1] != os.getuid() or sender[0] != (self.pid or sender[0]):
            problem = UntrustedPeer(f"a message of process {sender[0]} of user {sender[1]}")
        if problem:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            raise problem
        self.pid = sender[0]
        return data, descriptors
