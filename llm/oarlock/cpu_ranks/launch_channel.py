"""Messages between two ranks of one launch over a Unix socket: frames of one size, signed with the launch's key.

A frame may hand over one descriptor. Who sent it (process and user) is the kernel's word, not the frame's.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import struct
from typing import NamedTuple

from oarlock.errors import OarlockError

HELLO, CHALLENGE, PROOF, MEMBER, TAKEN, GO, STOP = range(1, 8)
MAX_RANKS = 1 << 16

# Magic, kind, rank, ranks in all, process, start time, bytes of memory, the sender's nonce. The signature follows.
_BODY = struct.Struct("<7sBIIIQQ32s")
_MAGIC = b"oarlock"
_SIGNATURE_BYTES = 32
FRAME_BYTES = _BODY.size + _SIGNATURE_BYTES
_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group
_ANCILLARY_BYTES = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_CREDENTIALS.size)


class Stranger(OarlockError):
    """What came over a socket is not from a member of this launch."""


class Ended(OarlockError):
    """The other side has closed the socket."""


class Frame(NamedTuple):
    """The content of a message. Fields that a kind does not need are 0."""

    kind: int
    rank: int = 0
    world_size: int = 0
    pid: int = 0
    started: int = 0
    nbytes: int = 0


def unpack_frame(data: bytes) -> tuple[Frame, bytes]:
    """A frame, its signature not yet looked at, and its sender's nonce.

    Raises:
        Stranger: it is none.
    """
    if len(data) != FRAME_BYTES:
        raise Stranger(f"a message of {len(data):,} bytes, not {FRAME_BYTES}")
    magic, kind, rank, world_size, pid, started, nbytes, nonce = _BODY.unpack(data[: _BODY.size])
    if magic != _MAGIC or not HELLO <= kind <= STOP:
        raise Stranger("a message that ranks do not send")
    if not 1 < world_size <= MAX_RANKS or rank >= world_size:
        raise Stranger(f"a message of rank {rank} of {world_size}")
    return Frame(kind, rank, world_size, pid, started, nbytes), nonce


class Channel:
    """A connection between rank 0 and another rank.

    Args:
        key: of the launch.
        is_first: whether this side is rank 0.

    Attributes:
        pid: the other side's process, once it has sent something.
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
        """Close the connection; the other side gets Ended."""
        self.socket.close()

    def send(self, frame: Frame, descriptor: int | None = None) -> None:
        """Send a frame, perhaps with a descriptor.

        Raises:
            Ended: nobody is there to receive it.
        """
        body = _BODY.pack(_MAGIC, *frame, self._nonce)
        signature = self._sign(self._me, b"" if frame.kind == HELLO else self._others_nonce, body)
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))] if descriptor is not None else []
        )
        try:
            self.socket.sendmsg([body + signature], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Ended(f"a rank could not be reached ({error.strerror or error})") from error

    def receive(self, *kinds: int) -> tuple[Frame, int | None]:
        """The next frame, of one of these kinds, and the descriptor that came with it (the caller's to close).

        Raises:
            Stranger: it is not from a member of this launch.
            Ended: the other side has closed the socket, or (a socket with a timeout) says nothing.
        """
        data, descriptors = self._receive()
        try:
            frame, nonce = unpack_frame(data)
            mine = b"" if frame.kind == HELLO else self._nonce
            signature = self._sign(self._other, mine, data[: _BODY.size])
            if not hmac.compare_digest(signature, data[_BODY.size :]):
                raise Stranger("a message without the key of this launch")
            if nonce != (self._others_nonce or nonce) or frame.kind not in (*kinds, STOP):
                raise Stranger("a message out of turn")
            if len(descriptors) != (frame.kind in (PROOF, MEMBER)):
                raise Stranger(f"a message with {len(descriptors)} descriptors")
        except Stranger:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        self._others_nonce = nonce
        return frame, descriptors[0] if descriptors else None

    def _sign(self, sender: bytes, receivers_nonce: bytes, body: bytes) -> bytes:
        return hmac.digest(self._key, b"%s %b %b" % (sender, receivers_nonce.hex().encode(), body), "sha256")

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            data, ancillary, flags, _ = self.socket.recvmsg(FRAME_BYTES + 1, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise Ended(f"a rank does not answer ({error.strerror or error})") from error
        descriptors: list[int] = []
        sender = (0, -1)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[:2]
        problem: OarlockError | None = None
        if not data:
            problem = Ended("a rank has gone")
        elif flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            problem = Stranger("a message that is too long")
        elif sender[1] != os.getuid() or sender[0] != (self.pid or sender[0]):
            problem = Stranger(f"a message of process {sender[0]} of user {sender[1]}")
        if problem:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            raise problem
        self.pid = sender[0]
        return data, descriptors
