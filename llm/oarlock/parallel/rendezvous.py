"""How ranks find each other's memory: addresses through Paddle's store, then a directory in each memory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from hashlib import blake2b
from typing import Any, NamedTuple

from oarlock.errors import EnvironmentProblem, OarlockError, StoppedWithOthers
from oarlock.parallel.failures import BOARD_BYTES, Describe, Member, Run, gave_up, give_up, open_board, started_at
from oarlock.parallel.shared_memory import Area, Memory, fence, round_up

_POLL_S = 0.002
_LOOK_S = 1.0
_LISTEN_S = 5.0
_START_S = 60.0  # at least: ranks import Paddle at their own pace, and its store takes 3 seconds now and then
_KEY = "oarlock/cpu_group"

# The directory follows the board in every rank's memory: a count (the word others wait on), then the entries.
_ENTRIES = 4096
_ENTRY = 32  # bytes: 16 of the name's digest, 8 of the offset
_FIRST_ENTRY = 64
DIRECTORY_BYTES = round_up(_FIRST_ENTRY + _ENTRIES * _ENTRY)

# The table of cards follows in rank 0's memory, a cache line for each rank: a word, then pid, descriptor, start time.
_CARD = struct.Struct("<iiQ")
_CARD_AT, _CARD_WORDS, _CARD_BYTES = 8, 16, 64
_HERE, _READY = 1, 2


class _Card(NamedTuple):
    """Where a rank's memory is."""

    pid: int
    started: int
    descriptor: int
    machine: str
    host: str


class Ranks(Run):
    """All ranks of the run, with the parts of memory that each has opened to the others by name."""

    def __init__(self, rank: int, members: list[Member], timeout_s: float) -> None:
        super().__init__(rank, members, timeout_s)
        self._directories = [member.memory.map(BOARD_BYTES, DIRECTORY_BYTES) for member in members]
        self._known: list[dict[bytes, int]] = [{} for _ in members]

    def offer(self, name: str, nbytes: int) -> Area:
        """Room in this rank's memory that the others can find by name."""
        directory, memory = self._directories[self.rank], self.members[self.rank].memory
        count = directory.words[0]
        if count >= _ENTRIES:
            raise EnvironmentProblem(f"this process has made {count:,} communication groups; no more fit")
        offset, at = memory.reserve(nbytes), _FIRST_ENTRY + count * _ENTRY
        entry = _digest(name) + offset.to_bytes(8, "little")
        directory.bytes[at : at + len(entry)] = memoryview(entry)
        directory.publish(0, count + 1)
        return memory.map(offset, nbytes)

    def find(self, rank: int, name: str, nbytes: int, describe: Describe) -> Area:
        """What another rank has offered under that name; waits for it (see wait_until)."""
        wanted = _digest(name)
        while (offset := self._look(rank, wanted)) is None:
            seen = len(self._known[rank])
            self.wait_until(self._directories[rank], 0, lambda count, seen=seen: count > seen, rank, describe)  # type: ignore[misc]
        return self.members[rank].memory.map(offset, nbytes)

    def offered(self, rank: int, name: str) -> bool:
        """Whether find() would return at once."""
        return self._look(rank, _digest(name)) is not None

    def _look(self, rank: int, wanted: bytes) -> int | None:
        known, directory = self._known[rank], self._directories[rank]
        for i in range(len(known), directory.words[0]):
            at = _FIRST_ENTRY + i * _ENTRY
            entry = directory.bytes[at : at + 24].tobytes()
            known[entry[:16]] = int.from_bytes(entry[16:], "little")
        return known.get(wanted)


def _digest(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


def wait_for_store() -> None:
    """Before Paddle connects to rank 0's store: give it a moment to listen. A refused Paddle sleeps for 3 seconds."""
    addresses = os.environ.get("PADDLE_MASTER") or os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
    port = os.environ.get("MASTER_PORT") or addresses.split(",")[0].rpartition(":")[2]
    deadline = time.monotonic() + _LISTEN_S
    while port.isdigit() and time.monotonic() < deadline and not _listens(int(port)):
        time.sleep(_POLL_S)


def _listens(port: int) -> bool:
    """Whether a process of this machine listens on a TCP port (without connecting to it)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            # "number: address:port peer:port state ..."; 0A is listening.
            if any(f":{port:04X} " in line[:50] and line.split()[3] == "0A" for line in file):
                return True
    return False


def join(store: Any, rank: int, world_size: int, timeout_s: float) -> Ranks:
    """Meet the other ranks; every rank calls it once.

    Only rank 0's address goes through the store (an answer of which takes 44 ms); the others write theirs into rank
    0's memory.

    Args:
        store: paddle's TCPStore, which all ranks reach.

    Raises:
        EnvironmentProblem: the ranks are on several machines (or containers), memory can't be shared, or a rank
            does not come.
        StoppedWithOthers: for one of these reasons, which another rank tells.
    """
    deadline = time.monotonic() + max(timeout_s, _START_S)
    memory = Memory.create()
    board = open_board(memory)
    memory.reserve(DIRECTORY_BYTES)
    own = _Card(os.getpid(), started_at(os.getpid()) or 0, memory.descriptor, _machine(), socket.gethostname())
    if rank == 0:
        table = memory.map(memory.reserve(world_size * _CARD_BYTES), world_size * _CARD_BYTES)
        store.set(_KEY, json.dumps(own))
        store.add(f"{_KEY}/set", 1)
        first = Member(own.pid, own.started, memory, board)
    else:
        card = _first_card(store, own, rank, deadline)
        first = _member(0, card.pid, card.descriptor, card.started)
        table = first.memory.map(BOARD_BYTES + DIRECTORY_BYTES, world_size * _CARD_BYTES)
    mine, at = _CARD.pack(own.pid, own.descriptor, own.started), rank * _CARD_BYTES + _CARD_AT
    table.bytes[at : at + _CARD.size] = memoryview(mine)
    table.publish(rank * _CARD_WORDS, _HERE)
    _wait_for_cards(table, first, store, own, rank, world_size, deadline)
    known = {0: first, rank: Member(own.pid, own.started, memory, board)}
    try:
        members = [known.get(i) or _member(i, *_card_at(table, i)) for i in range(world_size)]
    except EnvironmentProblem as problem:
        raise _told_once(problem, first.board) from problem
    ranks = Ranks(rank, members, timeout_s)
    ranks.start()
    # Nobody may leave, rank 0 with the store in particular, before all have opened what they need.
    table.publish(rank * _CARD_WORDS, _READY)
    for i in range(world_size):
        ranks.wait_until(table, i * _CARD_WORDS, lambda state: state == _READY, i, lambda i=i: ("the start", [i]))  # type: ignore[misc]
    return ranks


def _machine() -> str:
    """The same for two processes that can open each other's /proc entries."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError as error:
        raise EnvironmentProblem(f"CPU groups need /proc, which this system does not show: {error}") from error


def _first_card(store: Any, own: _Card, rank: int, deadline: float) -> _Card:
    """Rank 0's card. One of an earlier launch is left aside, should the store have outlived it."""
    while True:
        try:
            # get() would look every 3 seconds for a key that is not there yet.
            text = store.get(_KEY) if store.add(f"{_KEY}/set", 0) else ""
        except Exception as error:  # the store lives in rank 0's process
            raise EnvironmentProblem("rank 0 has gone before the other ranks could start") from error
        if time.monotonic() > deadline + 5 * _LOOK_S:
            raise EnvironmentProblem("rank 0 did not come to the run's start in time")
        if not text:
            continue
        card = _Card(*json.loads(text))
        if card.machine != own.machine:
            first_stranger = store.add(f"{_KEY}/strangers", 1) == 1
            if first_stranger:
                store.set(f"{_KEY}/stranger", json.dumps([rank, own.host]))
                raise _several_machines(0, card.host, rank, own.host)
            raise StoppedWithOthers("another rank tells that there are several machines")
        if started_at(card.pid) == card.started:
            return card
        time.sleep(0.1)


def _several_machines(rank: int, host: str, other: int, other_host: str) -> EnvironmentProblem:
    addresses = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    where = [
        f"rank {i} runs on {name}" + (f" ({addresses[i]})" if i < len(addresses) else "")
        for i, name in ((rank, host), (other, other_host))
    ]
    return EnvironmentProblem(
        f"CPU groups work on one host: {' and '.join(where)}, which share no memory (another machine, or another "
        "container). Start all ranks on one machine, or train on GPUs"
    )


def _member(rank: int, pid: int, descriptor: int, started: int) -> Member:
    try:
        memory = Memory.of_process(pid, descriptor)
    except OSError as error:
        if started_at(pid) != started:
            raise EnvironmentProblem(f"rank {rank} (pid {pid}) died at the start") from error
        raise EnvironmentProblem(
            f"rank {rank}'s memory (/proc/{pid}/fd/{descriptor}) can't be opened: {error.strerror}; "
            "CPU groups need all ranks to run under one user"
        ) from error
    return Member(pid, started, memory, memory.map(0, BOARD_BYTES))


def _wait_for_cards(
    table: Area, first: Member, store: Any, own: _Card, rank: int, world_size: int, deadline: float
) -> None:
    """Until all ranks have written theirs, or it is clear that they won't; one rank then tells why."""
    later = 0.05 * rank  # the lowest rank that is there tells, the others hear of it before they would
    look = time.monotonic() + _LOOK_S + later
    while missing := [i for i in range(world_size) if not table.words[i * _CARD_WORDS]]:
        time.sleep(_POLL_S)
        now = time.monotonic()
        if now < min(look, deadline + later):
            continue
        look = now + _LOOK_S
        problem: OarlockError | None = None
        fence()
        for i in set(range(world_size)) - set(missing):
            pid, _, started = _card_at(table, i)
            if started_at(pid) != started:
                problem = EnvironmentProblem(f"rank {i} (pid {pid}) died at the start")
        if not rank and store.add(f"{_KEY}/strangers", 0):
            problem = _several_machines(0, own.host, *json.loads(store.get(f"{_KEY}/stranger")))
        if now > deadline + later:
            problem = EnvironmentProblem(f"ranks {missing} did not come to the run's start in time")
        if problem or gave_up(first.board):
            raise _told_once(problem, first.board)
    fence()


def _told_once(problem: OarlockError | None, board: Area) -> OarlockError:
    """The problem, or silence when another rank had one first."""
    if problem is None or gave_up(board):
        return StoppedWithOthers("another rank tells why")
    give_up(board)
    return problem


def _card_at(table: Area, rank: int) -> tuple[int, int, int]:
    """A rank's pid, descriptor and start time."""
    at = rank * _CARD_BYTES + _CARD_AT
    pid, descriptor, started = _CARD.unpack(table.bytes[at : at + _CARD.size].tobytes())
    return pid, descriptor, started
