"""The meeting point of the CPU ranks of one launch, and how they authenticate each other. No port is opened.

Ranks forked by oarlock.cpu_ranks.fork_launch inherit connected sockets and a random key. Other launchers pass nothing
but environment variables. Their ranks meet at an abstract Unix socket, where the kernel reports the user and process at
the other end, and both ends prove that they know the launch's key without sending it. The key is derived from variables
that the launcher sets for its ranks, and from a random secret if OARLOCK_LAUNCH_SECRET_FILE names one (`oarlock launch`
sets it).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from hashlib import blake2b

from oarlock.environment.processes import find_peer
from oarlock.errors import EnvironmentProblem, StoppedWithOthers

SECRET_FILE = "OARLOCK_LAUNCH_SECRET_FILE"
_FACTS = ("PADDLE_MASTER", "MASTER_ADDR", "MASTER_PORT", "PADDLE_TRAINER_ENDPOINTS", "PADDLE_TRAINERS_NUM")
_SECRET_BYTES = (16, 4096)  # smallest and largest size of a secret file
_BACKLOG = 128
_POLL_S = 0.01
_TAKEN_S = 10.0  # for an earlier rank 0 to release the address


class MeetingPoint:
    """The address at which the ranks of one launch connect, or the sockets that they inherit.

    Attributes:
        key: the secret that ranks prove to know.
        inherited: connected sockets by the rank at the other end, if the launcher made them. Rank 0 has one per rank.
    """

    def __init__(self, key: bytes, inherited: dict[int, socket.socket] | None = None) -> None:
        self.key, self.inherited = key, inherited
        self.address = "\0oarlock-ranks-" + blake2b(key, digest_size=16, person=b"address").hexdigest()

    def listen(self) -> socket.socket:
        """Open the socket of rank 0 to which the others connect.

        Raises:
            EnvironmentProblem: another process uses the address.
        """
        place = _new_socket()
        patience = time.monotonic() + _TAKEN_S
        while True:
            try:
                place.bind(self.address)
                break
            except OSError as error:
                if time.monotonic() > patience:
                    place.close()
                    raise EnvironmentProblem(
                        f"the meeting point of this launch can't be opened ({error.strerror}): another launch with the "
                        "same addresses and ports runs on this machine, or another user has taken it. Start again with "
                        "another port"
                    ) from error
                time.sleep(_POLL_S)
        place.listen(_BACKLOG)
        place.setblocking(False)
        return place

    def connect(self, deadline: float) -> socket.socket:
        """Wait for rank 0 and connect to it.

        Raises:
            EnvironmentProblem: rank 0 does not start in time, or a process that can't be rank 0 has its address.
        """
        if self.inherited is not None:
            return self.inherited[0]
        while time.monotonic() < deadline:
            connection = _new_socket()
            try:
                connection.connect(self.address)
            except OSError:  # rank 0 is not listening yet, or has too many connections
                connection.close()
                time.sleep(_POLL_S)
                continue
            if problem := find_peer_problem(connection):
                connection.close()
                raise EnvironmentProblem(f"{problem} has taken the meeting point of this launch. Start it again")
            return connection
        raise EnvironmentProblem("rank 0 did not start in time")

    def close(self) -> None:
        """Close the inherited sockets. If the ranks meet again, they do so at the address."""
        for connection in (self.inherited or {}).values():
            connection.close()
        self.inherited = None


def _new_socket() -> socket.socket:
    place = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return place


_forked: MeetingPoint | None = None


def set_inherited(point: MeetingPoint) -> None:
    """In a forked rank: set its meeting point."""
    global _forked
    _forked = point


def connect_pairs(num_ranks: int) -> list[tuple[socket.socket, socket.socket]]:
    """Pairs of connected sockets for a launcher that forks: the ends of rank 0 and of rank 1, 2, ..."""
    return [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1, num_ranks)]


def meeting_point(part: str = "") -> MeetingPoint:
    """The meeting point of this launch, or of a part of its ranks.

    Args:
        part: a name that all ranks of the part use, and no others.

    Raises:
        EnvironmentProblem: the launch's secret file can't be read, or other users can read it.
    """
    if _forked is not None:
        return MeetingPoint(_hashed(_forked.key, part)) if part else _forked
    facts = [os.environ.get(name, "") for name in _FACTS]
    return MeetingPoint(_hashed(blake2b(_secret()).digest(), part, os.getuid(), *facts))


def _hashed(key: bytes, *facts: str | int) -> bytes:
    return blake2b(json.dumps(facts).encode(), key=key, digest_size=32).digest()


def _secret() -> bytes:
    path = os.environ.get(SECRET_FILE)
    if not path:
        return b""
    least, most = _SECRET_BYTES
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise EnvironmentProblem(f"{SECRET_FILE}={path}: not a file that only this user can read")
            secret = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EnvironmentProblem(f"{SECRET_FILE}={path}: can't be read ({reason})") from error
    if not least <= len(secret) <= most:
        raise EnvironmentProblem(f"{SECRET_FILE}={path}: a secret has {least} to {most:,} bytes")
    return secret


def find_peer_problem(connection: socket.socket) -> str | None:
    """Why the other end of a connection can't be a rank of this launch, or None."""
    pid, user = find_peer(connection)
    if user != os.geteuid():
        return f"a process of user {user}"
    if not is_in_same_container(pid):
        return "a process in another container"
    return None


def is_in_same_container(pid: int) -> bool:
    """Whether a process has the same PID namespace as this one."""
    try:
        return pid > 0 and os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def check_one_host(rank: int) -> None:
    """Refuse a launch on several machines before its ranks wait for each other.

    Raises:
        EnvironmentProblem: there are several machines; raised on the lowest rank of each.
        StoppedWithOthers: the same, on the other ranks.
    """
    hosts = [address.rpartition(":")[0] for address in os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")]
    if rank >= len(hosts):
        return
    own = hosts[rank]
    other = next((i for i, host in enumerate(hosts) if host != own and not _is_here(host)), None)
    if other is None:
        return
    first, last = sorted((rank, other))
    if any(host == own for host in hosts[:rank]):
        raise StoppedWithOthers("another rank reports that there are several machines")
    raise EnvironmentProblem(
        f"CPU groups work on one host: rank {first} runs on {hosts[first]} and rank {last} runs on {hosts[last]}, "
        "which share no memory. Start all ranks on one machine, or train on GPUs"
    )


def _is_here(host: str) -> bool:
    """Whether an IPv4 address may be this machine's."""
    try:
        socket.inet_aton(host)
    except OSError:
        return True  # a name; resolving it could take long
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((host, 0))  # fails for addresses of other machines; a datagram socket does not listen
        except OSError:
            return False
    return True
