"""What Linux knows of other processes: whether they run, when they began, and who is connected to a Unix socket."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_PEER = struct.Struct("iII")  # struct ucred: process, user, group


class Peer(NamedTuple):
    """The process at the other end of a connection, and its user, as the kernel noted them when it connected."""

    pid: int
    user: int


def peer_of(connection: socket.socket) -> Peer:
    """The other end of a connected Unix socket."""
    pid, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return Peer(pid, user)


def process_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: the state first, the parent's number second.

    Empty when the process is gone, or has ended and waits to be collected by its parent.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        return []
    return [] if not fields or fields[0] in "ZXx" else fields


def started_at(pid: int) -> int | None:
    """When a process began (clock ticks since boot), which tells it from a later one of the same number.

    None when it is gone, or has ended and waits to be collected by its parent.
    """
    fields = process_fields(pid)
    return int(fields[19]) if fields else None
