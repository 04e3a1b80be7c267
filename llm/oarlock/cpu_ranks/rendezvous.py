"""Joining the ranks of a run, and the named parts of memory that they share."""

from __future__ import annotations

import itertools
import math
import time
from functools import partial
from hashlib import blake2b
from typing import Any

from oarlock.cpu_ranks.failure_detector import (
    BOARD_BYTES,
    MAX_SHARED_BYTES,
    Describe,
    FailureDetector,
    RankProcess,
    open_board,
)
from oarlock.cpu_ranks.first_rank import RankMemory
from oarlock.cpu_ranks.meeting_point import MeetingPoint
from oarlock.cpu_ranks.memory_exchange import exchange_memories
from oarlock.cpu_ranks.shared_memory import MappedArea, MemoryFile, round_up
from oarlock.errors import EnvironmentProblem

_START_S = 60.0  # at least, because ranks import Paddle at different speeds

# The directory follows the board in every rank's memory: the number of entries (others wait for it), then the entries.
_ENTRIES = 4096
_ENTRY = 32  # bytes: 16 of the name's digest, 8 of the offset, 8 of the size
_FIRST_ENTRY = 64
DIRECTORY_BYTES = round_up(_FIRST_ENTRY + _ENTRIES * _ENTRY)


class ConnectedRanks(FailureDetector):
    """All ranks of a run, and the named parts of memory that they share."""

    def __init__(self, rank: int, members: list[RankProcess], timeout_s: float) -> None:
        super().__init__(rank, members, timeout_s)
        self._directories = [member.memory.map(BOARD_BYTES, DIRECTORY_BYTES) for member in members]
        self._known: list[dict[bytes, tuple[int, int]]] = [{} for _ in members]
        self._read = [0] * len(members)  # entries of each directory
        self._shared = itertools.count()

    def offer(self, name: str, nbytes: int) -> MappedArea:
        """Allocate shared memory that the other ranks can find by name."""
        memory = self.members[self.rank].memory
        offset = memory.reserve(nbytes)
        area = memory.map(offset, nbytes)
        self._enter_name(name, offset, nbytes)
        return area

    def _enter_name(self, name: str, offset: int, nbytes: int) -> None:
        directory = self._directories[self.rank]
        count = directory.words[0]
        if count >= _ENTRIES:
            raise EnvironmentProblem(f"this process has {count:,} communication groups, which is the maximum")
        at = _FIRST_ENTRY + count * _ENTRY
        entry = _digest(name) + offset.to_bytes(8, "little") + nbytes.to_bytes(8, "little")
        directory.bytes[at : at + len(entry)] = memoryview(entry)
        directory.publish(0, count + 1)

    def find(self, rank: int, name: str, nbytes: int, describe: Describe) -> MappedArea:
        """Map the memory that another rank has offered under a name. Waits for it as in wait_until()."""
        offset, offered = self._wait_for(rank, _digest(name), describe)
        if offered != nbytes:
            raise self.fail(
                f"rank {rank} offers {offered:,} bytes for {describe()[0]}, rank {self.rank} expects {nbytes:,}"
            )
        return self.members[rank].memory.map(offset, nbytes)

    def all_gather_objects(self, text: str) -> list[str]:
        """Every rank's text, in rank order. Waits without a timeout, until another rank fails."""
        content, name = text.encode(), f"shared {next(self._shared)}"
        if not 0 < len(content) <= MAX_SHARED_BYTES:
            raise self.fail(f"rank {self.rank} shares {len(content):,} bytes; 1 to {MAX_SHARED_BYTES:,} fit")
        memory = self.members[self.rank].memory
        offset = memory.reserve(len(content))
        memory.write(offset, content)
        self._enter_name(name, offset, len(content))
        return [self._read_shared(rank, name) for rank in range(len(self.members))]

    def _read_shared(self, rank: int, name: str) -> str:
        offset, nbytes = self._wait_for(rank, _digest(name), lambda: ("the start", [rank]), math.inf)
        if nbytes > MAX_SHARED_BYTES:
            raise self.fail(f"rank {rank} shares {nbytes:,} bytes; {MAX_SHARED_BYTES:,} fit")
        content = bytearray(nbytes)
        self.members[rank].memory.read(offset, content)
        return content.decode(errors="replace")

    def _wait_for(
        self, rank: int, wanted: bytes, describe: Describe, timeout_s: float | None = None
    ) -> tuple[int, int]:
        while (found := self._look(rank, wanted)) is None:
            arrived = partial(int.__lt__, self._read[rank])  # more entries than have been read
            self.wait_until(self._directories[rank], 0, arrived, rank, describe, timeout_s)
        return found

    def is_offered(self, rank: int, name: str) -> bool:
        """Whether find() would return at once."""
        return self._look(rank, _digest(name)) is not None

    def _look(self, rank: int, wanted: bytes) -> tuple[int, int] | None:
        known, directory = self._known[rank], self._directories[rank]
        count = directory.words[0]
        if count > _ENTRIES:
            raise self.fail(f"the memory directory of rank {rank} has {count:,} entries; {_ENTRIES:,} fit")
        for i in range(self._read[rank], count):
            at = _FIRST_ENTRY + i * _ENTRY
            entry = directory.bytes[at : at + _ENTRY].tobytes()
            known[entry[:16]] = int.from_bytes(entry[16:24], "little"), int.from_bytes(entry[24:], "little")
        self._read[rank] = count
        return known.get(wanted)


def _digest(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=16).digest()


def join_ranks(store: Any, rank: int, world_size: int, timeout_s: float) -> ConnectedRanks:
    """Connect to the other ranks of this launch. Every rank calls this once.

    Each rank sends the descriptor of its memory file to rank 0, over a Unix socket on which both have proved that they
    know the launch's key. Rank 0 passes the descriptors to all ranks. No file is opened by name.

    Args:
        store: a MeetingPoint. Paddle's store is refused, because it listens on every address of the machine and trusts
            every client.

    Raises:
        EnvironmentProblem: a rank does not start in time or has died, memory can't be shared, or another process
            answers.
        StoppedWithOthers: another rank reports one of these.
    """
    if not isinstance(store, MeetingPoint):
        raise EnvironmentProblem(
            f"CPU ranks need the meeting point of their launch; a {type(store).__name__} can't authenticate them"
        )
    memory = MemoryFile.create()
    open_board(memory)
    memory.reserve(DIRECTORY_BYTES)
    joined: list[ConnectedRanks] = []

    def open_all(memories: list[RankMemory]) -> None:
        members = [RankProcess(pid, started, each, each.map(0, BOARD_BYTES)) for pid, started, each in memories]
        joined.append(ConnectedRanks(rank, members, timeout_s))

    exchange_memories(store, memory, rank, world_size, time.monotonic() + max(timeout_s, _START_S), open_all)
    joined[0].start()
    return joined[0]
