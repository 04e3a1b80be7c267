"""How the ranks of a launch meet: who is admitted, and that strangers and broken members can't harm the others."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest

from oarlock.cpu_ranks import first_rank, launch_channel, meeting_point
from oarlock.cpu_ranks.launch_channel import Channel, Frame, FrameKind
from oarlock.cpu_ranks.meeting_point import MeetingPoint, connect_pairs
from oarlock.cpu_ranks.shared_memory import MemoryFile
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, StoppedWithOthers
from support.rank_meetings import SharedCollectives, admit_member, connect, send_proof


@pytest.fixture
def point() -> MeetingPoint:
    return MeetingPoint(os.urandom(32))


@pytest.mark.parametrize("world_size", [2, 5])
def test_every_rank_gets_the_memory_of_every_rank(point, world_size):
    meeting = SharedCollectives()
    for rank in reversed(range(world_size)):
        meeting.come(point, rank, world_size)
    assert meeting.all_met(world_size)


def test_forked_ranks_need_no_meeting_point():
    pairs, key = connect_pairs(3), os.urandom(32)
    points = [
        MeetingPoint(key, {1: pairs[0][0], 2: pairs[1][0]}),
        MeetingPoint(key, {0: pairs[0][1]}),
        MeetingPoint(key, {0: pairs[1][1]}),
    ]
    meeting = SharedCollectives()
    for rank, each in enumerate(points):
        meeting.come(each, rank, 3)
    assert meeting.all_met(3)
    names = Path("/proc/net/unix").read_text()
    assert points[0].address[1:] not in names


def test_a_forked_rank_that_ends_early_is_named():
    (first, second), other = connect_pairs(3)
    meeting = SharedCollectives()
    meeting.come(MeetingPoint(b"k" * 32, {1: first, 2: other[0]}), 0, 3)
    second.close()
    meeting.end()
    other[1].close()
    assert "rank 1 ended before all ranks were connected" in str(meeting.problems[0])


# Strangers.


def send_garbage(point: MeetingPoint) -> list[socket.socket]:
    made = [connect(point) for _ in range(4)]
    for each, data in zip(made, (b"GET / HTTP/1.1\r\n\r\n", b"\0", os.urandom(launch_channel.FRAME_BYTES), b"x" * 60_000), strict=True):  # fmt: skip
        each.send(data)
    return made


def send_nothing(point: MeetingPoint) -> list[socket.socket]:
    return [connect(point) for _ in range(3)]


def connect_thousands(point: MeetingPoint) -> list[socket.socket]:
    """More connections than the meeting point accepts at once; some stay, most leave."""
    kept = []
    for i in range(2000):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.setblocking(False)
        with contextlib.suppress(OSError):
            made.connect(point.address)
        if i % 10:
            made.close()
        else:
            kept.append(made)
    return kept


def use_other_key(point: MeetingPoint) -> list[socket.socket]:
    made = connect(point)
    Channel(made, b"another", is_first=False).send(Frame(FrameKind.HELLO, 1, 2))
    return [made]


def replay_greeting(point: MeetingPoint) -> list[socket.socket]:
    """A signed greeting can be replayed; the next message can't."""
    recorded: list[bytes] = []
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(first, point.key, is_first=False)
    channel.send(Frame(FrameKind.HELLO, 1, 2))
    recorded.append(second.recv(1000))
    made = connect(point)
    made.send(recorded[0])
    made.recv(1000)
    made.send(recorded[0])
    return [made, first, second]


def send_many_descriptors(point: MeetingPoint) -> list[socket.socket]:
    made, null = connect(point), os.open("/dev/null", os.O_RDWR)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("200i", *[null] * 200))]
    made.sendmsg([os.urandom(launch_channel.FRAME_BYTES)], rights)
    os.close(null)
    return [made]


@pytest.mark.parametrize(
    "stranger", [send_garbage, send_nothing, connect_thousands, use_other_key, replay_greeting, send_many_descriptors]
)
def test_strangers_do_not_disturb_the_ranks(point, stranger):
    before = len(os.listdir("/proc/self/fd"))
    meeting = SharedCollectives()
    meeting.come(point, 0, 2)
    left = stranger(point)
    meeting.come(point, 1, 2)
    assert meeting.all_met(2)
    for each in left:
        each.close()
    # Each of the two holds its own memory and the other's until it exits.
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_process_of_another_user_is_rejected_at_once(point, monkeypatch):
    meeting = SharedCollectives()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)  # to rank 0, everyone is another user
    meeting.come(point, 0, 2, wait_s=1.0)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while made.connect_ex(point.address):
        time.sleep(0.01)
    made.settimeout(30)
    assert made.recv(100) == b""
    meeting.end()
    made.close()
    expected = f"ranks [1] did not start in time (1 refused: a process of user {user})"
    assert str(meeting.problems[0]) == expected
    place = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place.bind(point.address)
    place.listen()
    meeting.come(point, 1, 2)
    meeting.end()
    place.close()
    assert f"a process of user {user} has taken the meeting point" in str(meeting.problems[1])


def test_an_occupied_meeting_point_is_an_error(point, monkeypatch):
    monkeypatch.setattr(meeting_point, "_TAKEN_S", 0.1)
    with contextlib.closing(point.listen()):
        meeting = SharedCollectives()
        meeting.come(point, 0, 2)
        meeting.end()
    assert "Start again with another port" in str(meeting.problems[0])


# Members that break the protocol.


def test_a_rank_that_sends_a_file_fails_the_launch_by_name(point, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"V" * 100_000)
    meeting = SharedCollectives()
    meeting.come(point, 0, 3)
    other = admit_member(point, 1, 3)
    with victim.open("r+b") as file:
        channel = send_proof(point, 2, 3)
        channel.send(Frame(FrameKind.PROOF, 2, 3), file.fileno())
        meeting.end()
    expected = f"rank 2 (pid {os.getpid()}): the descriptor of a rank's memory is not a memory"
    assert str(meeting.problems[0]).startswith(expected)
    with pytest.raises(StoppedWithOthers):  # rank 1 exits silently
        other.receive(FrameKind.MEMBER)
    channel.close()
    other.close()
    assert victim.read_bytes() == b"V" * 100_000


def test_a_rank_that_leaves_early_fails_the_launch_by_name(point):
    meeting = SharedCollectives()
    meeting.come(point, 0, 4)
    other = admit_member(point, 1, 4)
    admit_member(point, 2, 4).close()
    meeting.end()
    assert str(meeting.problems[0]).startswith(f"rank 2 (pid {os.getpid()}) stopped during the start")
    with pytest.raises(StoppedWithOthers):
        other.receive(FrameKind.MEMBER)
    other.close()


def test_a_duplicate_rank_is_rejected(point):
    meeting = SharedCollectives()
    meeting.come(point, 0, 3)
    first = admit_member(point, 1, 3)
    with pytest.raises(launch_channel.ConnectionClosed):
        send_proof(point, 1, 3)
    meeting.come(point, 2, 3)
    for _ in range(2):
        os.close(first.receive(FrameKind.MEMBER)[1])
    first.send(Frame(FrameKind.TAKEN, 1, 3))
    assert first.receive(FrameKind.GO)[0].kind == FrameKind.GO
    meeting.end()
    assert sorted(meeting.got) == [0, 2] and not meeting.problems
    first.close()


def test_only_rank_0_names_a_missing_rank(point):
    meeting = SharedCollectives()
    meeting.come(point, 0, 4, wait_s=1.0)
    other = admit_member(point, 2, 4)
    meeting.end()
    assert str(meeting.problems[0]) == "ranks [1, 3] did not start in time"
    with pytest.raises(StoppedWithOthers):
        other.receive(FrameKind.MEMBER)
    other.close()


# Something else in place of rank 0.


def send_file(channel: Channel, file: int) -> None:
    channel.send(Frame(FrameKind.MEMBER, 0, 2, channel.pid, process_start_time(os.getpid())), file)


def send_dead_process(channel: Channel, file: int) -> None:
    channel.send(Frame(FrameKind.MEMBER, 0, 2, channel.pid, 1), MemoryFile.create().descriptor)


def send_other_process(channel: Channel, file: int) -> None:
    channel.send(Frame(FrameKind.MEMBER, 0, 2, 1, process_start_time(1) or 0), MemoryFile.create().descriptor)


def hand_a_rank_of_a_larger_launch(channel: Channel, file: int) -> None:
    channel.send(
        Frame(FrameKind.MEMBER, 5, 6, channel.pid, process_start_time(os.getpid())), MemoryFile.create().descriptor
    )


def go_without_memory(channel: Channel, file: int) -> None:
    channel.send(Frame(FrameKind.GO, 0, 2))


def end(channel: Channel, file: int) -> None:
    channel.close()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (send_file, "is not a memory file"),
        (send_dead_process, "died during the start"),
        (send_other_process, "but reports 1"),
        (hand_a_rank_of_a_larger_launch, "rank 0 reports a launch of 6 ranks instead of 2"),
        (go_without_memory, "rank 0 ended before the other ranks could start (a message out of turn)"),
        (end, "rank 0 ended before the other ranks could start (a rank has closed its connection)"),
    ],
)
def test_descriptors_from_a_false_rank_0_are_checked(point, tmp_path, act, words):
    victim = tmp_path / "victim"
    victim.write_bytes(b"V" * 100_000)
    meeting = SharedCollectives()
    with contextlib.closing(point.listen()) as place, victim.open("r+b") as file:
        place.setblocking(True)
        meeting.come(point, 1, 2)
        channel = Channel(place.accept()[0], point.key, is_first=True)
        channel.receive(FrameKind.HELLO)
        channel.send(Frame(FrameKind.CHALLENGE, 0, 2))
        os.close(channel.receive(FrameKind.PROOF)[1])
        act(channel, file.fileno())
        meeting.end()
        channel.close()
    assert words in str(meeting.problems[1]) and type(meeting.problems[1]) is EnvironmentProblem
    assert victim.read_bytes() == b"V" * 100_000


def test_a_rank_0_without_the_key_gets_nothing(point):
    meeting = SharedCollectives()
    with contextlib.closing(point.listen()) as place:
        place.setblocking(True)
        meeting.come(point, 1, 2)
        made = place.accept()[0]
        made.recv(1000)
        Channel(made, b"another", is_first=True).send(Frame(FrameKind.CHALLENGE, 0, 2))
        meeting.end()
        assert made.recv(1000) == b""  # no memory arrived
        made.close()
    assert f"the process at rank 0's meeting point (pid {os.getpid()}) is not of this launch" in str(
        meeting.problems[1]
    )


def test_a_silent_connection_is_closed_in_time(point, monkeypatch):
    monkeypatch.setattr(first_rank, "PROOF_TIMEOUT_S", 0.2)
    meeting = SharedCollectives()
    meeting.come(point, 0, 2)
    made = connect(point)
    made.settimeout(30)
    assert made.recv(1) == b""
    meeting.come(point, 1, 2)
    assert meeting.all_met(2)
    made.close()
