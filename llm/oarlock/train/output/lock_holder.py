"""The content of a lock file: the process that holds the folder, and its last heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem
from oarlock.formats.json_file import parse_json

LARGEST = 4096  # bytes


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    Attributes:
        pid: its process id.
        host: the machine's host name.
        started, heartbeat: times of the lock and of the last heartbeat (ISO, UTC, by the file system's clock).
        boot: boot id of the kernel, which differs between machines with the same name.
        namespace: PID namespace, which differs between containers on one machine.
        process_start: start of the process in kernel ticks since boot, because process ids are reused.
        token: random token, by which a process recognises its own lock.
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
        """Describe this process; `now` is by the file system's clock."""
        pid, when = os.getpid(), _format_time(now)
        host, boot, namespace = socket.gethostname(), read_boot_id(), read_pid_namespace()
        return cls(pid, host, when, when, boot, namespace, process_start_time(pid) or 0, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: bytes) -> Holder | None:
        """Inverse of to_bytes(); None for anything else."""
        try:
            holder = parse_json(text, "lock file", cls, error=EnvironmentProblem, limit=LARGEST, extra="forbid")
            _ = holder.last_beat, holder.in_words  # raises if its times are not valid
        except (EnvironmentProblem, ValueError, OverflowError):
            return None
        return holder

    def to_bytes(self) -> bytes:
        """The content of the lock file. Its length does not change with the heartbeat."""
        return (json.dumps(asdict(self)) + "\n").encode()

    def with_heartbeat(self, now: float) -> Holder:
        """A copy with a new heartbeat."""
        return replace(self, heartbeat=_format_time(now))

    @property
    def last_beat(self) -> float:
        """The heartbeat in seconds since the epoch."""
        return datetime.fromisoformat(self.heartbeat).timestamp()

    @property
    def is_of_this_machine(self) -> bool:
        """True if it ran under this kernel and host name."""
        return (self.host, self.boot) == (socket.gethostname(), read_boot_id())

    @property
    def in_words(self) -> str:
        """A description for messages."""
        since = datetime.fromtimestamp(datetime.fromisoformat(self.started).timestamp()).astimezone()
        return f"process {self.pid} on {self.host} (since {since:%Y-%m-%d %H:%M:%S %z})"

    def is_running(self) -> bool | None:
        """Tell whether the process of this machine is running; None if its PID namespace is another (a container)."""
        if self.namespace != read_pid_namespace():
            return None
        return process_start_time(self.pid) == self.process_start and self.pid != os.getpid()


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def read_boot_id() -> str:
    """Read the kernel's boot id; "" if there is none (only Linux has one)."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def read_pid_namespace() -> str:
    """Read the id of this process's PID namespace."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
