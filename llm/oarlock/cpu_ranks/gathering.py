"""The start of a run: rank 0 takes a descriptor of every rank's memory, and passes all of them to every rank."""

from __future__ import annotations

import os
import time

from oarlock.cpu_ranks.first_rank import LOOK_S, PROVE_S, FirstRank, Handed, Open, died, itself
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
from oarlock.cpu_ranks.meeting_point import MeetingPoint
from oarlock.cpu_ranks.shared_memory import Memory
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, OarlockError, StoppedWithOthers

_TELL_S = 5.0  # for rank 0 to say that the time is up, before the others do


def gather(point: MeetingPoint, own: Memory, rank: int, world_size: int, deadline: float, open_all: Open) -> None:
    """Meet the other ranks; returns when all of them have opened everyone's memory.

    Args:
        deadline: of time.monotonic(), for all to come.

    Raises:
        EnvironmentProblem: a rank does not come, has died, or hands over what is no memory.
        StoppedWithOthers: another rank tells why.
    """
    try:
        if rank == 0:
            FirstRank(point, own, world_size, deadline).run(open_all)
        else:
            _join_first(point, own, rank, world_size, deadline, open_all)
    finally:
        point.close()


def _join_first(point: MeetingPoint, own: Memory, rank: int, world_size: int, deadline: float, open_all: Open) -> None:
    while True:
        channel = Channel(point.connect(deadline), point.key, is_first=False)
        channel.socket.settimeout(PROVE_S if point.inherited is None else max(LOOK_S, deadline - time.monotonic()))
        try:
            channel.send(Frame(HELLO, rank, world_size))
            frame, _ = channel.receive(CHALLENGE)
            break
        except Ended as problem:  # it was busy with others, or has ended
            channel.close()
            if time.monotonic() > deadline or point.inherited is not None:
                raise EnvironmentProblem("rank 0 did not come to the run's start in time") from problem
            time.sleep(0.05)
        except Stranger as problem:
            channel.close()
            raise EnvironmentProblem(
                f"what answers in rank 0's place (pid {channel.pid}) does not know this launch: {problem}"
            ) from problem
    channel.socket.settimeout(max(LOOK_S, deadline - time.monotonic()) + _TELL_S)
    try:
        if frame.kind == STOP:
            raise StoppedWithOthers("another rank says why the run can't start")
        channel.send(Frame(PROOF, rank, world_size, nbytes=own.nbytes), own.descriptor)
        open_all(_take_all(channel, own, rank, world_size))
        channel.send(Frame(TAKEN, rank, world_size))
        frame, _ = channel.receive(GO)
        if frame.kind == STOP:
            raise StoppedWithOthers("another rank says why the run can't start")
    except (Ended, Stranger) as problem:
        raise EnvironmentProblem(f"rank 0 has gone before the other ranks could start ({problem})") from problem
    except OarlockError as problem:
        if not isinstance(problem, StoppedWithOthers):
            _tell(channel, Frame(STOP, rank, world_size))
        raise
    finally:
        channel.close()


def _tell(channel: Channel, frame: Frame) -> None:
    try:
        channel.send(frame)
    except Ended:
        return  # rank 0 has gone too


def _take_all(channel: Channel, own: Memory, rank: int, world_size: int) -> list[Handed]:
    """What rank 0 hands over: every other rank's memory."""
    found = {rank: itself(own)}
    files = {_file(own)}
    while len(found) < world_size:
        frame, descriptor = channel.receive(MEMBER)
        if frame.kind == STOP:
            raise StoppedWithOthers("another rank says why the run can't start")
        assert descriptor is not None
        if frame.world_size != world_size:  # its rank may be none of this launch
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 says that the launch has {frame.world_size} ranks; it has {world_size}")
        memory = Memory.received(descriptor)
        if frame.rank in found or _file(memory) in files:
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 hands over rank {frame.rank}'s memory twice")
        if frame.rank == 0 and frame.pid != channel.pid:
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 is process {channel.pid} and calls itself {frame.pid}")
        if process_start_time(frame.pid) != frame.started:
            os.close(descriptor)
            raise died(frame.rank, frame.pid)
        files.add(_file(memory))
        found[frame.rank] = Handed(frame.pid, frame.started, memory)
    return [found[i] for i in range(world_size)]


def _file(memory: Memory) -> tuple[int, int]:
    found = os.fstat(memory.descriptor)
    return found.st_dev, found.st_ino
