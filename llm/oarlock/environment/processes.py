"""Other processes: whether they run, when they started, and which one is connected to a Unix socket (Linux)."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_PEER = struct.Struct("iII")  # struct ucred: process, user, group


class Peer(NamedTuple):
    """The process at the other end of a connection and its user, as recorded by the kernel when it connected."""

    pid: int
    user: int


def find_peer(connection: socket.socket) -> Peer:
    """The process at the other end of a connected Unix socket."""
    pid, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return Peer(pid, user)


def read_process_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; the first two are the state and the parent's PID.

    Empty if the process has ended, even if its parent has not collected it yet.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name may contain anything
    except OSError:
        return []
    return [] if not fields or fields[0] in "ZXx" else fields


def process_start_time(pid: int) -> int | None:
    """When a process started (clock ticks since boot), which distinguishes it from a later one with the same PID.

    None if the process has ended, even if its parent has not collected it yet.
    """
    fields = read_process_fields(pid)
    return int(fields[19]) if fields else None
