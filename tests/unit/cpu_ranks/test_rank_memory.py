"""What a rank accepts as another rank's memory, and what it reads from it."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import tempfile

import pytest

from oarlock.cpu_ranks import shared_memory
from oarlock.cpu_ranks.failure_detector import BOARD_BYTES, RankProcess, open_board
from oarlock.cpu_ranks.rendezvous import DIRECTORY_BYTES, ConnectedRanks
from oarlock.cpu_ranks.shared_memory import PAGE, MemoryFile, memory_bytes
from oarlock.errors import EnvironmentProblem, OarlockError


def memory_file(nbytes: int = 0, seals: int = shared_memory._SEALS) -> int:
    descriptor = os.memfd_create("forged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes or memory_bytes())
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def regular_file(folder: str | None = None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        os.ftruncate(file.fileno(), memory_bytes() if folder else 1 << 20)
        return os.dup(file.fileno())


def read_only() -> int:
    writable = memory_file()
    descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    os.close(writable)
    return descriptor


def one_end(ends: tuple[int, int]) -> int:
    os.close(ends[1])
    return ends[0]


FORGED = {
    "a file": regular_file,
    "a file in shared memory": lambda: regular_file("/dev/shm"),
    "a device": lambda: os.open("/dev/null", os.O_RDWR),
    "a pipe": lambda: one_end(os.pipe()),
    "a socket": lambda: socket.socketpair()[0].detach(),
    "a folder": lambda: os.open("/", os.O_RDONLY),
    "memory that is too small": lambda: memory_file(PAGE),
    "memory that is too large": lambda: memory_file(memory_bytes() + PAGE),
    "memory that may shrink": lambda: memory_file(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "memory that may be sealed further": lambda: memory_file(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK),
    "memory that nobody may write": lambda: memory_file(seals=shared_memory._SEALS | fcntl.F_SEAL_WRITE),
    "memory opened for reading": read_only,
}


@pytest.mark.parametrize("what", FORGED)
def test_descriptors_that_are_not_rank_memory_are_refused_and_closed(what):
    descriptor = FORGED[what]()
    with pytest.raises(EnvironmentProblem, match="the descriptor of a rank's memory"):
        MemoryFile.received(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_memory_of_another_user_is_refused(monkeypatch):
    memory = MemoryFile.create()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(EnvironmentProblem, match="belongs to user"):
        MemoryFile.received(os.dup(memory.descriptor))


def test_memory_keeps_its_size_and_content():
    memory = MemoryFile.received(os.dup(MemoryFile.create().descriptor))
    for size in (0, PAGE, memory.nbytes * 2):
        with pytest.raises(OSError):
            os.ftruncate(memory.descriptor, size)
    memory.map(memory.nbytes - PAGE, PAGE)
    wrong = (-PAGE, PAGE), (1, PAGE), (0, memory.nbytes + 1), (memory.nbytes, 1), (1 << 63, 1), ((1 << 64) - PAGE, PAGE)
    for offset, nbytes in wrong:
        with pytest.raises(EnvironmentProblem, match="outside the memory"):
            memory.map(offset, nbytes)
    for offset in (-PAGE, 1, memory.nbytes, 1 << 63):
        with pytest.raises(EnvironmentProblem, match="outside the memory"):
            memory.read(offset, bytearray(1))


def test_a_limit_of_file_sizes_bounds_the_memory(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10 * PAGE + 5, resource.RLIM_INFINITY))
    memory = MemoryFile.create()
    assert memory.nbytes == 10 * PAGE
    memory.reserve(9 * PAGE)
    with pytest.raises(EnvironmentProblem, match="ulimit -f"):
        memory.reserve(2 * PAGE)


# Values in another rank's memory.


@pytest.fixture
def two() -> tuple[ConnectedRanks, ConnectedRanks]:
    """Two ranks in this process."""
    memories = [MemoryFile.create() for _ in range(2)]
    for memory in memories:
        open_board(memory)
        memory.reserve(DIRECTORY_BYTES)
    seen = [[MemoryFile(os.dup(memory.descriptor)) for memory in memories] for _ in range(2)]
    for rank, memory in enumerate(memories):
        seen[rank][rank] = memory
    members = [[RankProcess(os.getpid(), 0, memory, memory.map(0, BOARD_BYTES)) for memory in each] for each in seen]
    first, second = (ConnectedRanks(rank, members[rank], 0.2) for rank in range(2))
    return first, second


def describe() -> tuple[str, list[int]]:
    return "a test", [1]


def enter(ranks: ConnectedRanks, number: int, offset: int, nbytes: int) -> None:
    """Write a directory entry as offer() does, with values chosen by another process."""
    from oarlock.cpu_ranks import rendezvous

    at = rendezvous._FIRST_ENTRY + number * rendezvous._ENTRY
    entry = rendezvous._digest("it") + struct.pack("<QQ", offset, nbytes)
    directory = ranks._directories[ranks.rank]
    directory.bytes[at : at + len(entry)] = memoryview(entry)
    directory.publish(0, number + 1)


def test_an_offered_tensor_is_found_by_the_other_rank(two):
    first, second = two
    first.offer("it", 2 * PAGE).bytes[:3] = memoryview(b"abc")
    assert second.find(0, "it", 2 * PAGE, describe).bytes[:3].tobytes() == b"abc"
    assert second.is_offered(0, "it") and not second.is_offered(0, "another")


@pytest.mark.parametrize("offset", [1, 1 << 40, (1 << 64) - PAGE, 1 << 63])
def test_an_offset_outside_the_memory_is_an_error(two, offset):
    first, second = two
    enter(first, 0, offset, PAGE)
    with pytest.raises(EnvironmentProblem, match="outside the memory"):
        second.find(0, "it", PAGE, describe)


def test_a_size_mismatch_is_an_error_on_both_ranks(two):
    first, second = two
    enter(first, 0, PAGE, 2 * PAGE)
    with pytest.raises(OarlockError, match="rank 0 offers 8,192 bytes for a test, rank 1 expects 4,096"):
        second.find(0, "it", PAGE, describe)
    assert first.failure().message.startswith("rank 0 offers")


@pytest.mark.parametrize("count", [4097, 0xFFFFFFFF])
def test_too_many_directory_entries_are_an_error(two, count):
    first, second = two
    first._directories[0].publish(0, count)
    with pytest.raises(OarlockError, match="entries; 4,096 fit"):
        second.find(0, "it", PAGE, describe)


def test_shared_texts_are_ordered_and_long_ones_are_refused(two):
    first, second = two
    offset = first.members[0].memory.reserve(5)
    first.members[0].memory.write(offset, b"first")
    first._enter_name("shared 0", offset, 5)
    assert second.all_gather_objects("second") == ["first", "second"]
    first._enter_name("shared 1", offset, 1 << 40)
    with pytest.raises(OarlockError, match="rank 0 shares 1,099,511,627,776 bytes; 16,777,216 fit"):
        second.all_gather_objects("second")


def test_a_malformed_failure_record_is_harmless(two):
    first, second = two
    board = first.members[0].board
    for index in range(16, 24):
        board.words[index] = 0xFFFFFFFF
    failure = second.failure()
    assert failure.reporter in (0, 1) and len(failure.message) <= PAGE
