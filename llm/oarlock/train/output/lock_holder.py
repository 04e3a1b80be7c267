"""The content of a lock file: which process on which machine has the folder, and its last sign of life."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from oarlock.errors import EnvironmentProblem
from oarlock.formats.json_file import parse_json
from oarlock.environment.processes import process_start_time

LARGEST = 4096  # bytes of a lock file


@dataclass(frozen=True)
class Holder:
    """The process that has a folder.

    Attributes:
        pid: its number.
        host: the machine's name.
        started, heartbeat: when it took the folder, and its last sign of life (ISO, UTC, by the file system's clock).
        boot: of the running kernel; two machines of one name differ in it.
        namespace: of process numbers; containers of one machine differ in it.
        process_start: in the kernel's ticks since the boot, since numbers are used again.
        token: of this lock, so that a process can tell its own.
    """

    pid: int
    host: str
    started: str
    heartbeat: str
    boot: str
    namespace: str
    process_start: int
    token: str

    @classmethod
    def this_process(cls, now: float) -> Holder:
        """The process that asks, at a time of the file system's clock."""
        pid, when = os.getpid(), _iso(now)
        return cls(
            pid, socket.gethostname(), when, when, boot(), namespace(), process_start_time(pid) or 0, secrets.token_hex(8)
        )

    @classmethod
    def parse(cls, text: bytes) -> Holder | None:
        """Inverse of text(); None for anything else."""
        try:
            holder = parse_json(text, "lock file", cls, error=EnvironmentProblem, limit=LARGEST, extra="forbid")
            _ = holder.last_beat, holder.in_words  # its times are some
        except (EnvironmentProblem, ValueError, OverflowError):
            return None
        return holder

    def text(self) -> bytes:
        """For the file; its length stays the same from heartbeat to heartbeat."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def alive_at(self, now: float) -> Holder:
        """The same with a later heartbeat."""
        return replace(self, heartbeat=_iso(now))

    @property
    def last_beat(self) -> float:
        """The heartbeat in seconds of the epoch."""
        return _seconds(self.heartbeat)

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it ran under this kernel (and host name, so that a lock can be read by people)."""
        return (self.host, self.boot) == (socket.gethostname(), boot())

    @property
    def in_words(self) -> str:
        """For messages."""
        since = datetime.fromtimestamp(_seconds(self.started)).astimezone()
        return f"process {self.pid} on {self.host} (since {since:%Y-%m-%d %H:%M:%S %z})"

    def is_running(self) -> bool | None:
        """Whether the process of this machine is there; None where its number means nothing here (a container)."""
        if self.namespace != namespace():
            return None
        return process_start_time(self.pid) == self.process_start and self.pid != os.getpid()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def boot() -> str:
    """The id of the running kernel's boot; "" where there is none (only Linux has it)."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def namespace() -> str:
    """The id of this process's namespace of process numbers."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
