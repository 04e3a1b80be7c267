"""Rank 0's part of the start: it admits the other ranks, takes their memory, and passes all of it to every rank."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

from oarlock.cpu_ranks.launch_channel import (
    CHALLENGE,
    GO,
    HELLO,
    MEMBER,
    PROOF,
    STOP,
    TAKEN,
    Channel,
    Ended,
    Frame,
    Stranger,
)
from oarlock.cpu_ranks.meeting_point import MeetingPoint, shares_processes, why_not
from oarlock.cpu_ranks.shared_memory import Memory
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, OarlockError, StoppedWithOthers

PROVE_S = 5.0  # for a connection to prove that it is a member's
LOOK_S = 1.0
_MAX_UNPROVEN = 64  # such connections at once


class Handed(NamedTuple):
    """A rank's memory and whose it is."""

    pid: int
    started: int
    memory: Memory


# Given every rank's memory in rank order: opens what the run needs of them.
Open = Callable[[list[Handed]], None]


def itself(memory: Memory) -> Handed:
    """This process and its own memory."""
    return Handed(os.getpid(), process_start_time(os.getpid()) or 0, memory)


def died(rank: int, pid: int) -> EnvironmentProblem:
    """The error for a rank whose process has gone."""
    return EnvironmentProblem(f"rank {rank} (pid {pid}) died at the start")


class _Guest:
    """A connection that may be another rank's."""

    def __init__(self, channel: Channel, patience: float, expected: int | None) -> None:
        self.channel, self.patience = channel, patience
        self.rank = expected
        self.is_inherited = expected is not None  # the launcher made the connection, and its other end has one process
        self.greeted = False


class FirstRank:
    """Rank 0's side."""

    def __init__(self, point: MeetingPoint, own: Memory, world_size: int, deadline: float) -> None:
        self._key, self._world_size, self._deadline = point.key, world_size, deadline
        self._found: dict[int, Handed] = {0: itself(own)}
        self._members: dict[int, Channel] = {}
        self._guests: list[_Guest] = []  # not proven yet, the oldest first
        self._refused: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._place: socket.socket | None = None
        if point.inherited is None:
            self._place = point.listen()
            self._selector.register(self._place, selectors.EVENT_READ)
        for expected, connection in (point.inherited or {}).items():
            self._watch_over(connection, deadline, expected)

    def run(self, open_all: Open) -> None:
        """Until all ranks have everything, or one has a reason why not."""
        try:
            self._wait_for_all()
            if self._place:
                self._place.close()  # from here on nobody can connect
            open_all([self._found[i] for i in range(self._world_size)])
            for rank, channel in sorted(self._members.items()):
                self._hand_over(rank, channel)
            for channel in self._members.values():
                self._say(channel, GO)
        except BaseException:
            for channel in self._members.values():
                self._say(channel, STOP)
            raise
        finally:
            self._selector.close()
            for each in (*self._members.values(), *(guest.channel for guest in self._guests)):
                each.close()
            if self._place:
                self._place.close()

    def _say(self, channel: Channel, kind: int) -> None:
        try:
            channel.send(Frame(kind, 0, self._world_size))
        except Ended:
            return  # the ranks find out who has gone

    def _watch_over(self, connection: socket.socket, patience: float, expected: int | None = None) -> None:
        connection.setblocking(False)
        guest = _Guest(Channel(connection, self._key, is_first=True), patience, expected)
        self._guests.append(guest)
        self._selector.register(guest.channel, selectors.EVENT_READ, guest)

    def _wait_for_all(self) -> None:
        while len(self._found) < self._world_size:
            now = time.monotonic()
            if now > self._deadline:
                missing = [i for i in range(self._world_size) if i not in self._found]
                refused = f" ({len(self._refused)} refused: {self._refused[-1]})" if self._refused else ""
                raise EnvironmentProblem(f"ranks {missing} did not come to the run's start in time{refused}")
            for guest in [guest for guest in self._guests if guest.patience < now]:
                self._refuse(guest, "a connection that did not prove the launch's key")
            for key, _ in self._selector.select(min(LOOK_S, self._deadline - now + 0.001)):
                if key.data is None:
                    self._accept()
                elif key.data in self._guests:
                    self._listen_to(key.data)
                else:
                    self._hear(key.data)

    def _accept(self) -> None:
        assert self._place is not None
        try:
            connection, _ = self._place.accept()
        except OSError:  # it has gone again, or there are no descriptors left
            time.sleep(0.001)
            return
        if problem := why_not(connection):
            connection.close()
            self._note(problem)
            return
        unproven = [guest for guest in self._guests if guest.rank is None]
        if len(unproven) >= _MAX_UNPROVEN:  # members take no time, so the oldest is none
            self._refuse(unproven[0], "more connections at once than ranks make")
        self._watch_over(connection, time.monotonic() + PROVE_S)

    def _note(self, why: str) -> None:
        self._refused = [*self._refused[-999:], why]

    def _refuse(self, guest: _Guest, why: str) -> None:
        self._note(why)
        self._guests.remove(guest)
        self._selector.unregister(guest.channel)
        guest.channel.close()

    def _listen_to(self, guest: _Guest) -> None:
        """A guest has sent something, or gone."""
        descriptor: int | None = None
        try:
            frame, descriptor = guest.channel.receive(PROOF if guest.greeted else HELLO)
            if not guest.greeted:
                self._greet(guest, frame)
                return
            if frame.kind == STOP:
                raise StoppedWithOthers("another rank says why the run can't start")
        except (Stranger, Ended) as problem:
            if guest.is_inherited:
                raise EnvironmentProblem(f"rank {guest.rank} ended before the ranks met ({problem})") from problem
            self._refuse(guest, str(problem))
            return
        assert descriptor is not None and guest.rank is not None
        self._admit(guest, guest.rank, descriptor)

    def _greet(self, guest: _Guest, frame: Frame) -> None:
        if frame.kind != HELLO or not frame.rank or frame.world_size != self._world_size:
            raise Stranger(f"rank {frame.rank} of {frame.world_size}, in a launch of {self._world_size}")
        if guest.rank not in (None, frame.rank) or frame.rank in self._found:
            raise Stranger(f"a second rank {frame.rank} (pid {guest.channel.pid})")
        if not shares_processes(guest.channel.pid):
            raise Stranger(f"process {guest.channel.pid} of another container")
        guest.rank = frame.rank
        guest.channel.send(Frame(CHALLENGE, 0, self._world_size))
        guest.greeted = True

    def _admit(self, guest: _Guest, rank: int, descriptor: int) -> None:
        """A guest has proved to be a member and handed over its memory."""
        pid = guest.channel.pid
        if rank in self._found:
            os.close(descriptor)
            self._refuse(guest, f"a second rank {rank} (pid {pid})")
            return
        self._guests.remove(guest)
        self._members[rank] = guest.channel
        self._selector.modify(guest.channel, selectors.EVENT_READ, rank)
        try:
            memory = Memory.received(descriptor)
        except EnvironmentProblem as problem:
            raise EnvironmentProblem(f"rank {rank} (pid {pid}): {problem}") from problem
        started = process_start_time(pid)
        if started is None:
            raise died(rank, pid)
        self._found[rank] = Handed(pid, started, memory)

    def _hear(self, rank: int) -> None:
        """A member has spoken while nothing is asked of it: it has ended, or tells why it can't start."""
        channel = self._members[rank]
        try:
            channel.receive(STOP)
        except (Ended, Stranger) as problem:
            raise self._gone(rank, problem) from problem
        raise StoppedWithOthers("another rank says why the run can't start")

    def _gone(self, rank: int, problem: OarlockError) -> EnvironmentProblem:
        pid, started, _ = self._found[rank]
        if process_start_time(pid) != started:
            return died(rank, pid)
        return EnvironmentProblem(f"rank {rank} (pid {pid}) does not go on with the start: {problem}")

    def _hand_over(self, rank: int, channel: Channel) -> None:
        """One rank after the other, so that the system's limit on descriptors under way is never reached."""
        channel.socket.settimeout(max(LOOK_S, self._deadline - time.monotonic()))
        try:
            for other, (pid, started, memory) in self._found.items():
                if other != rank:
                    frame = Frame(MEMBER, other, self._world_size, pid, started, memory.nbytes)
                    channel.send(frame, memory.descriptor)
            frame, _ = channel.receive(TAKEN)
        except (Ended, Stranger) as problem:
            raise self._gone(rank, problem) from problem
        if frame.kind == STOP:
            raise StoppedWithOthers("another rank says why the run can't start")
