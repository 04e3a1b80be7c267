"""Records the ports on which the processes of a launch listen while it runs."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

_LOOK_S = 0.1
_LISTENS = "0A"


class PortWatch:
    """Polls the descendants of a process while its `with` block runs.

    Attributes:
        found: "program (pid) on address:port" of every TCP port that one of them listened on.
        processes: that were looked at.
    """

    def __init__(self, parent: int | None = None) -> None:
        self._parent = parent or os.getpid()
        self.found: set[str] = set()
        self.processes: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PortWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            places = _listening()
            for pid in _descendants(self._parent):
                self.processes.add(pid)
                for inode in _sockets_of(pid) & places.keys():
                    with contextlib.suppress(OSError):
                        name = Path(f"/proc/{pid}/comm").read_text().strip()
                        self.found.add(f"{name} ({pid}) on {places[inode]}")


def _listening() -> dict[str, str]:
    """Inode of a listening socket -> its address."""
    found = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS:
                    address, _, port = fields[1].partition(":")
                    if table == "tcp":
                        address = socket.inet_ntoa(struct.pack("<I", int(address, 16)))
                    found[fields[9]] = f"{address}:{int(port, 16)}"
    return found


def _descendants(parent: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found: set[int] = set()
    new = {parent}
    while new:
        new = {pid for pid, above in parents.items() if above in new} - found
        found |= new
    return found


def _sockets_of(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[8:-1])
    return found
