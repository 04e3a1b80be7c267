"""Rank 0's side of the start: it admits the other ranks, receives their memory files, and passes them to every rank."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from oarlock.cpu_ranks.launch_channel import Channel, ConnectionClosed, Frame, FrameKind, UntrustedPeer
from oarlock.cpu_ranks.meeting_point import MeetingPoint, find_peer_problem, is_in_same_container
from oarlock.cpu_ranks.shared_memory import MemoryFile
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, OarlockError

PROOF_TIMEOUT_S = 5.0  # for a connection to prove that it belongs to the launch
CHECK_INTERVAL_S = 1.0
_MAX_UNPROVEN = 64  # unproven connections at once


class RankMemory(NamedTuple):
    """A rank's memory file, and the process that owns it."""

    pid: int
    started: int
    memory: MemoryFile


# Called with every rank's memory file, in rank order, to map what the run needs of them.
OpenMemories = Callable[[list[RankMemory]], None]


def own_memory(memory: MemoryFile) -> RankMemory:
    """This process and its memory file."""
    return RankMemory(os.getpid(), process_start_time(os.getpid()) or 0, memory)


def make_death_error(rank: int, pid: int) -> EnvironmentProblem:
    """The error for a rank whose process has ended."""
    return EnvironmentProblem(f"rank {rank} (pid {pid}) died during the start")


class _Candidate:
    """A connection that may belong to another rank."""

    def __init__(self, channel: Channel, proof_deadline: float, expected: int | None) -> None:
        self.channel, self.proof_deadline = channel, proof_deadline
        self.rank = expected
        self.is_inherited = expected is not None  # made by the launcher; only one process has the other end
        self.greeted = False


class FirstRank:
    """Rank 0's side of the start."""

    def __init__(self, point: MeetingPoint, own: MemoryFile, world_size: int, deadline: float) -> None:
        self._key, self._world_size, self._deadline = point.key, world_size, deadline
        self._found: dict[int, RankMemory] = {0: own_memory(own)}
        self._members: dict[int, Channel] = {}
        self._candidates: list[_Candidate] = []  # without proof yet, the oldest first
        self._refused: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._place: socket.socket | None = None
        if point.inherited is None:
            self._place = point.listen()
            self._selector.register(self._place, selectors.EVENT_READ)
        for expected, connection in (point.inherited or {}).items():
            self._add_candidate(connection, deadline, expected)

    def run(self, open_all: OpenMemories) -> None:
        """Return when all ranks have all memory files, or raise the reason why they can't."""
        try:
            self._wait_for_all()
            if self._place:
                self._place.close()  # no more connections
            open_all([self._found[i] for i in range(self._world_size)])
            # All memory files to one rank at a time, to stay below the limit on descriptors in flight.
            for rank, channel in sorted(self._members.items()):
                channel.socket.settimeout(max(CHECK_INTERVAL_S, self._deadline - time.monotonic()))
                try:
                    for other, (pid, started, memory) in self._found.items():
                        if other != rank:
                            frame = Frame(FrameKind.MEMBER, other, self._world_size, pid, started, memory.nbytes)
                            channel.send(frame, memory.descriptor)
                    channel.receive(FrameKind.TAKEN)
                except (ConnectionClosed, UntrustedPeer) as problem:
                    raise self._explain_loss(rank, problem) from problem
            for channel in self._members.values():
                self._send_kind(channel, FrameKind.GO)
        except BaseException:
            for channel in self._members.values():
                self._send_kind(channel, FrameKind.STOP)
            raise
        finally:
            self._selector.close()
            for each in (*self._members.values(), *(candidate.channel for candidate in self._candidates)):
                each.close()
            if self._place:
                self._place.close()

    def _send_kind(self, channel: Channel, kind: int) -> None:
        try:
            channel.send(Frame(kind, 0, self._world_size))
        except ConnectionClosed:
            return  # the other ranks will notice

    def _add_candidate(self, connection: socket.socket, proof_deadline: float, expected: int | None = None) -> None:
        connection.setblocking(False)
        candidate = _Candidate(Channel(connection, self._key, is_first=True), proof_deadline, expected)
        self._candidates.append(candidate)
        self._selector.register(candidate.channel, selectors.EVENT_READ, candidate)

    def _wait_for_all(self) -> None:
        while len(self._found) < self._world_size:
            now = time.monotonic()
            if now > self._deadline:
                missing = [i for i in range(self._world_size) if i not in self._found]
                refused = f" ({len(self._refused)} refused: {self._refused[-1]})" if self._refused else ""
                raise EnvironmentProblem(f"ranks {missing} did not start in time{refused}")
            for candidate in [candidate for candidate in self._candidates if candidate.proof_deadline < now]:
                self._refuse(candidate, "a connection that did not prove that it knows the launch's key")
            for key, _ in self._selector.select(min(CHECK_INTERVAL_S, self._deadline - now + 0.001)):
                if key.data is None:
                    self._accept()
                elif key.data in self._candidates:
                    self._receive_from_candidate(key.data)
                else:  # a rank that has ended, or that reports why it can't start
                    try:
                        self._members[key.data].receive()
                    except (ConnectionClosed, UntrustedPeer) as problem:
                        raise self._explain_loss(key.data, problem) from problem

    def _accept(self) -> None:
        assert self._place is not None
        try:
            connection, _ = self._place.accept()
        except OSError:  # it is closed again, or no descriptors are left
            time.sleep(0.001)
            return
        if problem := find_peer_problem(connection):
            connection.close()
            self._record_refusal(problem)
            return
        unproven = [candidate for candidate in self._candidates if candidate.rank is None]
        if len(unproven) >= _MAX_UNPROVEN:  # ranks prove themselves at once, so the oldest is not one
            self._refuse(unproven[0], "too many connections at once")
        self._add_candidate(connection, time.monotonic() + PROOF_TIMEOUT_S)

    def _record_refusal(self, why: str) -> None:
        self._refused = [*self._refused[-999:], why]

    def _refuse(self, candidate: _Candidate, why: str) -> None:
        self._record_refusal(why)
        self._candidates.remove(candidate)
        self._selector.unregister(candidate.channel)
        candidate.channel.close()

    def _receive_from_candidate(self, candidate: _Candidate) -> None:
        """Handle a message of a candidate, or the end of its connection."""
        descriptor: int | None = None
        try:
            frame, descriptor = candidate.channel.receive(FrameKind.PROOF if candidate.greeted else FrameKind.HELLO)
            if not candidate.greeted:
                if frame.kind != FrameKind.HELLO or not frame.rank or frame.world_size != self._world_size:
                    raise UntrustedPeer(f"rank {frame.rank} of {frame.world_size}, in a launch of {self._world_size}")
                if candidate.rank not in (None, frame.rank) or frame.rank in self._found:
                    raise UntrustedPeer(f"a second rank {frame.rank} (pid {candidate.channel.pid})")
                if not is_in_same_container(candidate.channel.pid):
                    raise UntrustedPeer(f"process {candidate.channel.pid} of another container")
                candidate.rank = frame.rank
                candidate.channel.send(Frame(FrameKind.CHALLENGE, 0, self._world_size))
                candidate.greeted = True
                return
        except (UntrustedPeer, ConnectionClosed) as problem:
            if candidate.is_inherited:
                raise EnvironmentProblem(
                    f"rank {candidate.rank} ended before all ranks were connected ({problem})"
                ) from problem
            self._refuse(candidate, str(problem))
            return
        assert descriptor is not None and candidate.rank is not None
        self._admit(candidate, candidate.rank, descriptor)

    def _admit(self, candidate: _Candidate, rank: int, descriptor: int) -> None:
        """Accept a candidate that has sent its proof and its memory file."""
        pid = candidate.channel.pid
        if rank in self._found:
            os.close(descriptor)
            self._refuse(candidate, f"a second rank {rank} (pid {pid})")
            return
        self._candidates.remove(candidate)
        self._members[rank] = candidate.channel
        self._selector.modify(candidate.channel, selectors.EVENT_READ, rank)
        try:
            memory = MemoryFile.received(descriptor)
        except EnvironmentProblem as problem:
            raise EnvironmentProblem(f"rank {rank} (pid {pid}): {problem}") from problem
        started = process_start_time(pid)
        if started is None:
            raise make_death_error(rank, pid)
        self._found[rank] = RankMemory(pid, started, memory)

    def _explain_loss(self, rank: int, problem: OarlockError) -> EnvironmentProblem:
        pid, started, _ = self._found[rank]
        if process_start_time(pid) != started:
            return make_death_error(rank, pid)
        return EnvironmentProblem(f"rank {rank} (pid {pid}) stopped during the start: {problem}")
