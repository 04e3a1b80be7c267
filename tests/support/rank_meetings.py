"""Ranks that meet in threads of one process, and connections that send arbitrary bytes."""

from __future__ import annotations

import os
import socket
import threading
import time

from oarlock.cpu_ranks.launch_channel import Channel, Frame, FrameKind
from oarlock.cpu_ranks.meeting_point import MeetingPoint
from oarlock.cpu_ranks.memory_exchange import exchange_memories
from oarlock.cpu_ranks.shared_memory import PAGE, MemoryFile
from oarlock.environment.processes import process_start_time
from oarlock.errors import OarlockError


class SharedCollectives:
    """Ranks in threads of this process, and the result or the error of each."""

    def __init__(self) -> None:
        self.got: dict[int, list[int]] = {}
        self.problems: dict[int, OarlockError] = {}
        self._threads: list[threading.Thread] = []

    def come(self, point: MeetingPoint, rank: int, world_size: int, wait_s: float = 60.0) -> None:
        self._threads.append(threading.Thread(target=self._meet, args=(point, rank, world_size, wait_s)))
        self._threads[-1].start()

    def _meet(self, point: MeetingPoint, rank: int, world_size: int, wait_s: float) -> None:
        memory = MemoryFile.create()
        memory.map(memory.reserve(PAGE), PAGE).words[0] = 1000 + rank

        def read(handed):
            self.got[rank] = [each.memory.map(0, PAGE).words[0] for each in handed]
            assert {(each.pid, each.started) for each in handed} == {(os.getpid(), process_start_time(os.getpid()))}

        try:
            exchange_memories(point, memory, rank, world_size, time.monotonic() + wait_s, read)
        except OarlockError as problem:
            self.problems[rank] = problem

    def end(self) -> None:
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()

    def all_met(self, world_size: int) -> bool:
        self.end()
        assert not self.problems
        return self.got == {rank: [1000 + i for i in range(world_size)] for rank in range(world_size)}


def connect(point: MeetingPoint) -> socket.socket:
    """Connect to rank 0 as soon as it listens."""
    return point.connect(time.monotonic() + 60)


def send_proof(point: MeetingPoint, rank: int, world_size: int) -> Channel:
    channel = Channel(connect(point), point.key, is_first=False)
    channel.socket.settimeout(60)
    channel.send(Frame(FrameKind.HELLO, rank, world_size))
    channel.receive(FrameKind.CHALLENGE)
    return channel


def admit_member(point: MeetingPoint, rank: int, world_size: int) -> Channel:
    """A member whose memory rank 0 has, or will have before it handles later messages."""
    channel = send_proof(point, rank, world_size)
    channel.send(Frame(FrameKind.PROOF, rank, world_size), MemoryFile.create().descriptor)
    return channel
