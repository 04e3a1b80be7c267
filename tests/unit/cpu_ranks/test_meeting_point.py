"""Which stores a rank trusts, and the key that the ranks of a launch share."""

from __future__ import annotations

import json
import os

import pytest

from forged_store import ForgedStore
from oarlock.cpu_ranks import meeting_point
from oarlock.cpu_ranks.rendezvous import join_ranks
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem, OarlockError


def store_of(card: object) -> ForgedStore:
    return ForgedStore(card if isinstance(card, str) else json.dumps(card))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shape", ["a path", "a number", "a mapping", "no JSON", "nothing"])
def test_a_store_of_another_process_opens_no_file(tmp_path, rank, shape):
    victim = tmp_path / "victim"
    victim.write_bytes(b"V" * 4_000_000)
    with victim.open("r+b") as file:
        pid = os.getpid()
        cards = {
            "a path": [pid, process_start_time(pid), f"../../..{victim}", "machine", "host"],
            "a number": [pid, process_start_time(pid), file.fileno(), "machine", "host"],
            "a mapping": {"pid": pid, "descriptor": file.fileno()},
            "no JSON": "[" * 100_000,
            "nothing": "",
        }
        with pytest.raises(OarlockError, match="need the meeting point of their launch"):
            join_ranks(store_of(cards[shape]), rank, 2, 3.0)
    assert victim.read_bytes() == b"V" * 4_000_000


# The key.


def test_each_launch_has_its_own_meeting_point(monkeypatch, tmp_path):
    monkeypatch.setenv("PADDLE_MASTER", "127.0.0.1:1234")
    facts = meeting_point.meeting_point()
    assert meeting_point.meeting_point().address == facts.address
    monkeypatch.setenv("PADDLE_MASTER", "127.0.0.1:1235")
    assert meeting_point.meeting_point().address != facts.address
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    monkeypatch.setenv(meeting_point.SECRET_FILE, str(secret))
    with_secret = meeting_point.meeting_point()
    assert meeting_point.meeting_point().key == with_secret.key != facts.key
    secret.write_bytes(os.urandom(32))
    assert meeting_point.meeting_point().key != with_secret.key
    assert secret.read_bytes().hex() not in repr(vars(with_secret))


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [(b"x" * 15, 0o600, "has 16 to 4,096 bytes"), (b"x" * 5000, 0o600, "has 16 to"), (b"x" * 32, 0o640, "only this user")],
)  # fmt: skip
def test_an_invalid_secret_is_an_error(monkeypatch, tmp_path, content, mode, words):
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    secret.chmod(mode)
    monkeypatch.setenv(meeting_point.SECRET_FILE, str(secret))
    with pytest.raises(EnvironmentProblem, match=words):
        meeting_point.meeting_point()


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "device"])
def test_a_secret_is_a_file(monkeypatch, tmp_path, kind):
    path = tmp_path / "secret"
    if kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir(0o700)
    monkeypatch.setenv(meeting_point.SECRET_FILE, "/dev/null" if kind == "device" else str(path))
    with pytest.raises(EnvironmentProblem, match="OARLOCK_LAUNCH_SECRET_FILE="):
        meeting_point.meeting_point()
