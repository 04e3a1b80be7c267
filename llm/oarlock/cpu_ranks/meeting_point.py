"""Where the CPU ranks of one launch meet, and how they know each other. No port is opened.

Ranks forked by oarlock.cpu_ranks.fork_launch inherit connected sockets and a random key. Others (Paddle's launcher
hands
nothing on but the environment) meet at an abstract Unix socket: the kernel says which user and process is at the other
end, and both ends prove that they know the launch's key, without saying it. The key is made of what the launcher tells
its ranks alone and, where OARLOCK_LAUNCH_SECRET_FILE names one (the launch scripts do), of a random secret.
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
_SECRET_BYTES = (16, 4096)  # of a secret file, at least and at most
_BACKLOG = 128
_POLL_S = 0.01
_TAKEN_S = 10.0  # for an earlier rank 0 to leave the place


class MeetingPoint:
    """Where the ranks of one launch meet.

    Attributes:
        key: what members prove that they know.
        inherited: connected sockets by the other side's rank, where the launcher made them; rank 0 has all.
    """

    def __init__(self, key: bytes, inherited: dict[int, socket.socket] | None = None) -> None:
        self.key, self.inherited = key, inherited
        self.address = "\0oarlock-ranks-" + blake2b(key, digest_size=16, person=b"address").hexdigest()

    def listen(self) -> socket.socket:
        """Rank 0's place, for the others to connect to.

        Raises:
            EnvironmentProblem: another process has taken it.
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
                        f"the place where the ranks of this launch meet can't be opened ({error.strerror}): another "
                        "launch with the same addresses and ports runs on this machine, or another user has taken it; "
                        "start again with another port"
                    ) from error
                time.sleep(_POLL_S)
        place.listen(_BACKLOG)
        place.setblocking(False)
        return place

    def connect(self, deadline: float) -> socket.socket:
        """A connection to rank 0, of this user and in this container; waits for it.

        Raises:
            EnvironmentProblem: it does not come, or a process that can't be rank 0 has taken its place.
        """
        if self.inherited is not None:
            return self.inherited[0]
        while time.monotonic() < deadline:
            connection = _new_socket()
            try:
                connection.connect(self.address)
            except OSError:  # not there yet, or too many at once
                connection.close()
                time.sleep(_POLL_S)
                continue
            if problem := why_not(connection):
                connection.close()
                raise EnvironmentProblem(
                    f"{problem} has taken the place where the ranks of this launch meet; start it again"
                )
            return connection
        raise EnvironmentProblem("rank 0 did not come to the run's start in time")

    def close(self) -> None:
        """Close the inherited sockets. Ranks that meet again do so at the address."""
        for connection in (self.inherited or {}).values():
            connection.close()
        self.inherited = None


def _new_socket() -> socket.socket:
    place = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return place


_forked: MeetingPoint | None = None


def inherit(point: MeetingPoint) -> None:
    """In a forked rank: set the place where it meets the others."""
    global _forked
    _forked = point


def connected_pairs(num_ranks: int) -> list[tuple[socket.socket, socket.socket]]:
    """Pairs of connected sockets for a launcher that forks: rank 0's end and the other's, for ranks 1, 2, ..."""
    return [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1, num_ranks)]


def meeting_point(part: str = "") -> MeetingPoint:
    """This launch's, or that of a part of its ranks.

    Args:
        part: which; the same for its ranks, and no other part's.

    Raises:
        EnvironmentProblem: the secret that the launch names can't be read, or may have been read by others.
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
                raise EnvironmentProblem(f"{SECRET_FILE}={path}: not a file that this user alone can read")
            secret = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EnvironmentProblem(f"{SECRET_FILE}={path}: can't be read ({reason})") from error
    if not least <= len(secret) <= most:
        raise EnvironmentProblem(f"{SECRET_FILE}={path}: a secret has {least} to {most:,} bytes")
    return secret


def why_not(connection: socket.socket) -> str | None:
    """Why the other end of a connection can't be a rank of this launch; None if it may be one."""
    pid, user = find_peer(connection)
    if user != os.geteuid():
        return f"a process of user {user}"
    if not shares_processes(pid):
        return "a process in another container"
    return None


def shares_processes(pid: int) -> bool:
    """Whether a process sees the same process numbers as this one (is not in another container)."""
    try:
        return pid > 0 and os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False


def check_one_host(rank: int) -> None:
    """Refuse ranks that the launcher has put on several machines, before they wait for each other.

    Raises:
        EnvironmentProblem: there are several; on the lowest rank of each.
        StoppedWithOthers: on the others.
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
        raise StoppedWithOthers("another rank says that there are several machines")
    raise EnvironmentProblem(
        f"CPU groups work on one host: rank {first} runs on {hosts[first]} and rank {last} runs on {hosts[last]}, "
        "which share no memory. Start all ranks on one machine, or train on GPUs"
    )


def _is_here(host: str) -> bool:
    """Whether an IPv4 address may be this machine's."""
    try:
        socket.inet_aton(host)
    except OSError:
        return True  # a name; asking for its address could take long
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((host, 0))  # only an address of this machine can be taken; a datagram socket does not listen
        except OSError:
            return False
    return True
