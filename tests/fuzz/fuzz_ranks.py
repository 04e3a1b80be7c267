"""How a rank handles bytes of another: cards in a store, messages at the start (also signed ones, with every kind of
descriptor), values that ranks share, directories and boards in a rank's memory.

The first byte of an input selects one; the rest is the content, for messages a sequence of records (see _send).
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from harness import Harness

from forged_store import ForgedStore
from oarlock.cpu_ranks import launch_channel
from oarlock.cpu_ranks.failure_detector import BOARD_BYTES, RankProcess, open_board
from oarlock.cpu_ranks.launch_channel import FRAME_BYTES, Channel, Frame, FrameKind, unpack_frame
from oarlock.cpu_ranks.meeting_point import MeetingPoint
from oarlock.cpu_ranks.memory_exchange import exchange_memories
from oarlock.cpu_ranks.rendezvous import DIRECTORY_BYTES, ConnectedRanks, join_ranks
from oarlock.cpu_ranks.shared_memory import PAGE, MemoryFile
from oarlock.environment.processes import process_start_time
from oarlock.errors import OarlockError
from oarlock.parallel import nodes

KEY, NONCE = b"k" * 32, b"n" * 32
CONTENT = b"V" * 10_000
_RECORD = struct.Struct("<BBBBBB")  # how, kind, rank, ranks in all, process, whose descriptor
_RAW = 1  # a complete frame follows the record and is sent verbatim
_UNSIGNED = 2


@functools.cache
def _hold_memory() -> MemoryFile:
    return MemoryFile.create()


@functools.cache
def _pair() -> tuple[ConnectedRanks, ConnectedRanks]:
    memories = [MemoryFile.create() for _ in range(2)]
    for memory in memories:
        open_board(memory)
        memory.reserve(DIRECTORY_BYTES)
    members = [
        RankProcess(os.getpid(), process_start_time(os.getpid()) or 0, each, each.map(0, BOARD_BYTES))
        for each in memories
    ]
    return ConnectedRanks(0, members, 0.001), ConnectedRanks(1, members, 0.001)


def _descriptor(which: int, victim: Path) -> int | None:
    made: list[Callable[[], int]] = [
        lambda: os.memfd_create("forged", os.MFD_ALLOW_SEALING),
        lambda: os.open(victim, os.O_RDONLY),
        lambda: os.open("/dev/null", os.O_RDWR),
        lambda: os.dup(_hold_memory().descriptor),
        lambda: MemoryFile.create().descriptor,
        lambda: os.pipe()[0],
    ]
    return made[which - 1]() if 1 <= which <= len(made) else None


def _send(channel: Channel, content: bytes, victim: Path) -> None:
    """Send a sequence of records, each in a frame, and then nothing more."""
    while len(content) >= _RECORD.size:
        how, kind, rank, world_size, process, which = _RECORD.unpack(content[: _RECORD.size])
        content = content[_RECORD.size :]
        descriptor = _descriptor(which, victim)
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
        with contextlib.suppress(OSError, launch_channel.ConnectionClosed):
            if how & _RAW:
                channel.socket.sendmsg([content[:FRAME_BYTES] or b"x"], rights)
                content = content[FRAME_BYTES:]
            else:
                channel._key = b"another" if how & _UNSIGNED else KEY
                channel._others_nonce = NONCE
                pid = os.getpid() if process < 200 else process
                channel.send(Frame(kind, rank, world_size, pid, process_start_time(pid) or 0, PAGE), descriptor)
    channel.socket.shutdown(socket.SHUT_WR)


def _meet(rank: int, content: bytes, victim: Path) -> None:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with mine, theirs, mock.patch.object(os, "urandom", lambda size: NONCE[:size]):
        _send(Channel(theirs, KEY, is_first=rank == 1), content, victim)
        point = MeetingPoint(KEY, {1 - rank: mine})
        exchange_memories(point, _hold_memory(), rank, 2, time.monotonic() + 0.05, lambda handed: None)


def _shared(content: bytes) -> None:
    value = nodes._parse(1, content.decode(errors="replace") if content[-1:] < b"\x80" else content)
    for read in (lambda: nodes._key(1, value), lambda: nodes._pair(1, value), lambda: nodes._flags([value])):
        with contextlib.suppress(OarlockError):
            read()


def _memory(content: bytes) -> None:
    first, second = _pair()
    board, directory = first.members[0].board, first._directories[0]
    half = len(content) // 2
    for area, part, at in ((board, content[:half], 64), (directory, content[half:], 0)):
        area.bytes[:] = 0
        area.bytes[at : at + len(part[:PAGE])] = memoryview(part[:PAGE])
    for known in (*first._known, *second._known):
        known.clear()
    second._read = [0, 0]
    second.failure()
    board.bytes[:] = 0  # otherwise the failure would wait for the rank that reported the first one
    for name in list(second._known[0]) or [b"x" * 16]:
        second._look(0, name)
    for offset, nbytes in second._known[0].values():
        with contextlib.suppress(OarlockError):
            first.members[0].memory.read(offset, bytearray(min(nbytes, PAGE)))


def _target(data: bytes, folder: Path) -> None:
    victim = folder / "victim"
    if not victim.exists():
        victim.write_bytes(CONTENT)
    before = set(os.listdir("/proc/self/fd"))
    way, content = (data[0] % 6 if data else 0), data[1:]
    try:
        if way == 0:
            unpack_frame(content)
        elif way in (1, 2):
            _meet(way - 1, content, victim)
        elif way == 3:
            join_ranks(ForgedStore(content), 1, 2, 0.1)
        elif way == 4:
            _shared(content)
        else:
            _memory(content)
    finally:
        for left in set(os.listdir("/proc/self/fd")) - before:  # what a rank holds until it exits
            with contextlib.suppress(OSError):
                os.close(int(left))
        assert victim.read_bytes() == CONTENT


def _seeds() -> list[bytes]:
    _hold_memory()
    _pair()

    def record(kind: int, rank: int, which: int = 0, how: int = 0, world_size: int = 2, process: int = 0) -> bytes:
        return _RECORD.pack(how, kind, rank, world_size, process, which)

    greeting, proof, taken = record(FrameKind.HELLO, 1), record(FrameKind.PROOF, 1, 5), record(FrameKind.TAKEN, 1)
    challenge, member, go = record(FrameKind.CHALLENGE, 0), record(FrameKind.MEMBER, 0, 5), record(FrameKind.GO, 0)
    entry = b"d" * 16 + struct.pack("<QQ", PAGE, PAGE)
    return [
        b"\x01" + greeting + proof + taken,
        b"\x01" + greeting + record(FrameKind.PROOF, 1, 2) + taken,
        b"\x01" + record(FrameKind.HELLO, 1, how=_UNSIGNED),
        b"\x01" + record(0, 0, how=_RAW) + os.urandom(FRAME_BYTES),
        b"\x02" + challenge + member + go,
        b"\x02" + challenge + record(FrameKind.MEMBER, 0, 2) + go,
        b"\x02" + challenge + record(FrameKind.MEMBER, 0, 5, process=250) + go,
        b"\x00" + launch_channel._BODY.pack(b"oarlock", FrameKind.HELLO, 1, 2, 0, 0, 0, NONCE) + b"s" * 32,
        b'\x03[1, 2, "../../../etc/passwd", "machine", "host"]',
        b"\x04true",
        b'\x04["host", 0]',
        b"\x04[false, {}]",
        b"\x04\xef\xbb\xbf\x80",  # these import codecs
        b"\x04\xff\xfe\x80",
        b"\x04\xff\xfe\x00\x00\x80",
        b"\x05" + bytes(40) + struct.pack("<I", 1) + bytes(60) + entry,
    ]


HARNESS = Harness(
    target=_target,
    seeds=_seeds,
    tokens=[
        b"\xff" * 8,
        bytes(8),
        struct.pack("<Q", PAGE),
        b"oarlock",
        b"[" * 50,
        b"1e999",
        bytes([FrameKind.HELLO, 1, 2]),
    ],
)
