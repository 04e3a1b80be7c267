"""The start of a run: rank 0 receives a descriptor of every rank's memory file and passes all of them to every rank."""

from __future__ import annotations

import contextlib
import os
import time

from oarlock.cpu_ranks.first_rank import (
    CHECK_INTERVAL_S,
    PROOF_TIMEOUT_S,
    FirstRank,
    OpenMemories,
    RankMemory,
    make_death_error,
    own_memory,
)
from oarlock.cpu_ranks.launch_channel import Channel, ConnectionClosed, Frame, FrameKind, UntrustedPeer
from oarlock.cpu_ranks.meeting_point import MeetingPoint
from oarlock.cpu_ranks.shared_memory import MemoryFile
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, OarlockError, StoppedWithOthers

_REPORT_S = 5.0  # for rank 0 to report a timeout before the others do


def exchange_memories(
    point: MeetingPoint, own: MemoryFile, rank: int, world_size: int, deadline: float, open_all: OpenMemories
) -> None:
    """Connect to the other ranks. Returns when each rank has mapped the memory files of all.

    Args:
        deadline: in the time of time.monotonic().

    Raises:
        EnvironmentProblem: a rank does not start in time, has died, or sends something else than its memory file.
        StoppedWithOthers: another rank reports the reason.
    """
    try:
        if rank == 0:
            FirstRank(point, own, world_size, deadline).run(open_all)
        else:
            _join_first(point, own, rank, world_size, deadline, open_all)
    finally:
        point.close()


def _join_first(
    point: MeetingPoint, own: MemoryFile, rank: int, world_size: int, deadline: float, open_all: OpenMemories
) -> None:
    while True:
        channel = Channel(point.connect(deadline), point.key, is_first=False)
        channel.socket.settimeout(
            PROOF_TIMEOUT_S if point.inherited is None else max(CHECK_INTERVAL_S, deadline - time.monotonic())
        )
        try:
            channel.send(Frame(FrameKind.HELLO, rank, world_size))
            channel.receive(FrameKind.CHALLENGE)
            break
        except StoppedWithOthers:
            channel.close()
            raise
        except ConnectionClosed as problem:  # rank 0 is busy with others, or has ended
            channel.close()
            if time.monotonic() > deadline or point.inherited is not None:
                raise EnvironmentProblem("rank 0 did not start in time") from problem
            time.sleep(0.05)
        except UntrustedPeer as problem:
            channel.close()
            raise EnvironmentProblem(
                f"the process at rank 0's meeting point (pid {channel.pid}) is not of this launch: {problem}"
            ) from problem
    channel.socket.settimeout(max(CHECK_INTERVAL_S, deadline - time.monotonic()) + _REPORT_S)
    try:
        channel.send(Frame(FrameKind.PROOF, rank, world_size, nbytes=own.nbytes), own.descriptor)
        open_all(_receive_memories(channel, own, rank, world_size))
        channel.send(Frame(FrameKind.TAKEN, rank, world_size))
        channel.receive(FrameKind.GO)
    except (ConnectionClosed, UntrustedPeer) as problem:
        raise EnvironmentProblem(f"rank 0 ended before the other ranks could start ({problem})") from problem
    except OarlockError as problem:
        if not isinstance(problem, StoppedWithOthers):
            with contextlib.suppress(ConnectionClosed):  # rank 0 is gone too
                channel.send(Frame(FrameKind.STOP, rank, world_size))
        raise
    finally:
        channel.close()


def _receive_memories(channel: Channel, own: MemoryFile, rank: int, world_size: int) -> list[RankMemory]:
    """Receive every other rank's memory file from rank 0."""
    found = {rank: own_memory(own)}
    files = {_file_id(own)}
    while len(found) < world_size:
        frame, descriptor = channel.receive(FrameKind.MEMBER)
        assert descriptor is not None
        if frame.world_size != world_size:  # its rank may be out of range
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 reports a launch of {frame.world_size} ranks instead of {world_size}")
        memory = MemoryFile.received(descriptor)
        if frame.rank in found or _file_id(memory) in files:
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 sends the memory of rank {frame.rank} twice")
        if frame.rank == 0 and frame.pid != channel.pid:
            os.close(descriptor)
            raise EnvironmentProblem(f"rank 0 is process {channel.pid}, but reports {frame.pid}")
        if process_start_time(frame.pid) != frame.started:
            os.close(descriptor)
            raise make_death_error(frame.rank, frame.pid)
        files.add(_file_id(memory))
        found[frame.rank] = RankMemory(frame.pid, frame.started, memory)
    return [found[i] for i in range(world_size)]


def _file_id(memory: MemoryFile) -> tuple[int, int]:
    found = os.fstat(memory.descriptor)
    return found.st_dev, found.st_ino
