"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import LLM
from oarlock.environment.processes import process_start_time
from oarlock.errors import EnvironmentProblem
from oarlock.train.output import lock
from oarlock.train.output.lock import LOCK_FILE, acquire_lock, current_lock, hold_output_lock
from oarlock.train.output.lock_holder import Holder
from support.locks import write_lock

HOLD = """
import sys, time
from pathlib import Path
from oarlock.train.output.lock import acquire_lock
lock = acquire_lock(Path(sys.argv[1]))
print("have it", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    environment = {**os.environ, "PYTHONPATH": str(LLM)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "have it\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "then"])
def test_invalid_times_hold_no_lock(tmp_path, time):
    text = write_lock(tmp_path / "out", started=time).read_bytes()
    assert Holder.parse(text) is None
    acquire_lock(tmp_path / "out").release()


@pytest.fixture
def without_kernel_locks(monkeypatch):
    """A file system without locks."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "_SETTLED_S", 0.05)


def test_the_second_process_names_the_holder_and_changes_nothing(other, tmp_path):
    folder = tmp_path / "out"
    (folder / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_ctime_ns for path in (folder, *folder.iterdir())}
    host = json.loads((folder / LOCK_FILE).read_text())["host"]
    with pytest.raises(
        EnvironmentProblem, match=rf"out: process {other.pid} on {host} \(since 20.* is running in this"
    ):
        acquire_lock(folder)
    assert {path: path.stat().st_ctime_ns for path in (folder, *folder.iterdir())} == before


@pytest.mark.parametrize("kernel", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(other, tmp_path, capsys, kernel, request):
    if not kernel:
        request.getfixturevalue("without_kernel_locks")
        with pytest.raises(EnvironmentProblem, match=f"process {other.pid} on"):
            acquire_lock(tmp_path / "out")
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = acquire_lock(tmp_path / "out")
    assert f"was held by process {other.pid} on" in capsys.readouterr().out and lock.find_loss() is None
    assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list((tmp_path / "out").iterdir())


def test_a_reused_process_id_is_not_the_holder(tmp_path, without_kernel_locks):
    """The id of a living process (the parent of this one), which started at another time."""
    me = Holder.this_process(0)
    write_lock(tmp_path, host=me.host, pid=os.getppid(), process_start=1)
    acquire_lock(tmp_path).release()
    write_lock(tmp_path, host=me.host, pid=os.getppid(), process_start=process_start_time(os.getppid()))
    with pytest.raises(EnvironmentProblem, match=f"process {os.getppid()} on"):
        acquire_lock(tmp_path)


def test_the_lock_of_another_user(other, tmp_path, monkeypatch):
    """In a folder that both may write: it can be read, and removed when its process is gone."""
    really, path = os.open, tmp_path / "out" / LOCK_FILE
    theirs = path.stat().st_ino

    def deny(name, flags, *more):
        if flags & os.O_RDWR and not flags & os.O_EXCL and Path(name).exists() and os.stat(name).st_ino == theirs:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return really(name, flags, *more)

    monkeypatch.setattr("os.open", deny)
    with pytest.raises(EnvironmentProblem, match=f"process {other.pid} on"):
        acquire_lock(tmp_path / "out")
    other.kill()
    other.wait()
    lock = acquire_lock(tmp_path / "out")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_lock_of_another_host_expires_after_two_minutes(tmp_path, capsys):
    for changes in ({}, {"boot": "another", "host": Holder.this_process(0).host}):
        path = write_lock(tmp_path, age=100, **changes)
        with pytest.raises(
            EnvironmentProblem, match=r"last heartbeat 1\d\d s ago\) is running .*120 s after the last heartbeat"
        ):
            acquire_lock(tmp_path)
        assert sorted(tmp_path.iterdir()) == [path]
        write_lock(tmp_path, age=130, **changes)
        acquire_lock(tmp_path).release()
        assert "process 4000000 on" in capsys.readouterr().out


def test_clock_differences_are_harmless(tmp_path, monkeypatch):
    """Only times of the file system are compared."""
    write_lock(tmp_path)
    monkeypatch.setattr("time.time", lambda: 4e9)
    with pytest.raises(EnvironmentProblem, match="is running"):
        acquire_lock(tmp_path)


def test_a_lock_that_a_server_keeps_for_a_dead_host(other, tmp_path):
    """As NFS does for a dead client: the kernel lock exists, but the heartbeat has stopped."""
    path = tmp_path / "out" / LOCK_FILE
    stored = json.loads(path.read_text()) | {"host": "elsewhere", "heartbeat": "2001-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(stored))
    lock = acquire_lock(tmp_path / "out")
    assert lock.find_loss() is None
    lock.release()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_something_else_in_place_of_the_lock_is_refused(tmp_path, kind):
    path = tmp_path / LOCK_FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "victim").write_text("theirs")
        path.symlink_to(tmp_path / "victim" if kind == "link" else "/dev/zero")
    with pytest.raises(
        EnvironmentProblem, match=r"not a lock file of a run.*delete it|a lock file is a regular file.*delete it"
    ):
        acquire_lock(tmp_path)
    assert kind != "link" or (tmp_path / "victim").read_text() == "theirs"


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 300, b'{"pid": "one"}', b"[" * 3000])
def test_an_empty_lock_is_taken_over(tmp_path, content, monkeypatch):
    """Its process was killed before it wrote its name."""
    monkeypatch.setattr(lock, "_SETTLED_S", 0.05)
    (tmp_path / LOCK_FILE).write_bytes(content)
    taken = acquire_lock(tmp_path)
    assert Holder.parse((tmp_path / LOCK_FILE).read_bytes()).pid == os.getpid()
    taken.release()


def test_heartbeats_update_the_lock_in_place(tmp_path):
    lock = acquire_lock(tmp_path)
    before = (tmp_path / LOCK_FILE).read_bytes()
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    lock.write_heartbeat()
    assert len((tmp_path / LOCK_FILE).read_bytes()) == len(before) and (tmp_path / LOCK_FILE).stat().st_mtime > 1e9
    lock.release()


def test_nested_use_and_other_ranks_take_no_lock(tmp_path, monkeypatch):
    with hold_output_lock(tmp_path), hold_output_lock(tmp_path):
        assert current_lock() is not None
    assert current_lock() is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    with hold_output_lock(tmp_path / "none"):
        assert current_lock() is None and not (tmp_path / "none").exists()
