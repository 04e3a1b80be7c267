"""One run per output_dir: who has it is said, locks of the dead are taken over, and a folder that is lost is noticed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import LLM, write_checkpoint
from oarlock.environment.processes import started_at
from oarlock.errors import EnvironmentProblem, OutputLost, TrainingError
from oarlock.train.checkpoint.row_file import append_rows, read_rows
from oarlock.train.output import folder_guard, lock
from oarlock.train.output.folder_guard import RUN_FILE, check_output, run_in, writing
from oarlock.train.output.lock import LOCK_FILE, OutputLock, held_lock, output_held, take
from oarlock.train.output.lock_holder import Holder

HOLD = """
import sys, time
from pathlib import Path
from oarlock.train.output.lock import take
lock = take(Path(sys.argv[1]))
print("have it", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    environment = {**os.environ, "PYTHONPATH": str(LLM)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "have it\n"
    yield process
    process.kill()
    process.wait()


def write_lock(folder: Path, age: float = 0.0, **changes) -> Path:
    """The lock of a process that is gone or elsewhere."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.touch()
    holder = Holder.this_process(path.stat().st_mtime - age)
    path.write_text(json.dumps(vars(holder) | {"pid": 4_000_000, "host": "elsewhere"} | changes))
    os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    return path


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "then"])
def test_times_that_are_none_hold_nothing(tmp_path, time):
    text = write_lock(tmp_path / "out", started=time).read_bytes()
    assert Holder.parse(text) is None
    take(tmp_path / "out").release()


@pytest.fixture
def without_kernel_locks(monkeypatch):
    """A file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    monkeypatch.setattr(lock, "_SETTLED_S", 0.05)


def test_the_second_says_who_has_it_and_touches_nothing(other, tmp_path):
    folder = tmp_path / "out"
    (folder / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_ctime_ns for path in (folder, *folder.iterdir())}
    host = json.loads((folder / LOCK_FILE).read_text())["host"]
    with pytest.raises(
        EnvironmentProblem, match=rf"out: process {other.pid} on {host} \(since 20.* is running in this"
    ):
        take(folder)
    assert {path: path.stat().st_ctime_ns for path in (folder, *folder.iterdir())} == before


@pytest.mark.parametrize("kernel", [True, False])
def test_a_killed_one_is_taken_over(other, tmp_path, capsys, kernel, request):
    if not kernel:
        request.getfixturevalue("without_kernel_locks")
        with pytest.raises(EnvironmentProblem, match=f"process {other.pid} on"):
            take(tmp_path / "out")
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = take(tmp_path / "out")
    assert f"was in use by process {other.pid} on" in capsys.readouterr().out and lock.lost() is None
    assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list((tmp_path / "out").iterdir())


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, without_kernel_locks):
    """The number of a living process (the parent of this one), which began at another time."""
    me = Holder.this_process(0)
    write_lock(tmp_path, host=me.host, pid=os.getppid(), process_start=1)
    take(tmp_path).release()
    write_lock(tmp_path, host=me.host, pid=os.getppid(), process_start=started_at(os.getppid()))
    with pytest.raises(EnvironmentProblem, match=f"process {os.getppid()} on"):
        take(tmp_path)


def test_the_lock_of_another_user(other, tmp_path, monkeypatch):
    """In a folder that both may write into: it can be read, and removed when its process is gone."""
    really, path = os.open, tmp_path / "out" / LOCK_FILE
    theirs = path.stat().st_ino

    def deny(name, flags, *more):
        if flags & os.O_RDWR and not flags & os.O_EXCL and Path(name).exists() and os.stat(name).st_ino == theirs:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return really(name, flags, *more)

    monkeypatch.setattr("os.open", deny)
    with pytest.raises(EnvironmentProblem, match=f"process {other.pid} on"):
        take(tmp_path / "out")
    other.kill()
    other.wait()
    lock = take(tmp_path / "out")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_another_host_is_given_two_minutes(tmp_path, capsys):
    for changes in ({}, {"boot": "another", "host": Holder.this_process(0).host}):
        path = write_lock(tmp_path, age=100, **changes)
        with pytest.raises(EnvironmentProblem, match=r"sign of life 1\d\d s ago, is running .*after 120 s without one"):
            take(tmp_path)
        assert sorted(tmp_path.iterdir()) == [path]
        write_lock(tmp_path, age=130, **changes)
        take(tmp_path).release()
        assert "process 4000000 on" in capsys.readouterr().out


def test_clocks_that_differ_do_no_harm(tmp_path, monkeypatch):
    """Only times of the file system are compared."""
    write_lock(tmp_path)
    monkeypatch.setattr("time.time", lambda: 4e9)
    with pytest.raises(EnvironmentProblem, match="is running"):
        take(tmp_path)


def test_a_lock_that_a_server_keeps_for_a_dead_host(other, tmp_path):
    """As NFS does for a client that is gone: the kernel's lock is there, a sign of life is not."""
    path = tmp_path / "out" / LOCK_FILE
    stored = json.loads(path.read_text()) | {"host": "elsewhere", "heartbeat": "2001-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(stored))
    lock = take(tmp_path / "out")
    assert lock.lost() is None
    lock.release()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "device"])
def test_something_else_in_place_of_the_lock(tmp_path, kind):
    path = tmp_path / LOCK_FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "victim").write_text("theirs")
        path.symlink_to(tmp_path / "victim" if kind == "link" else "/dev/zero")
    with pytest.raises(EnvironmentProblem, match=r"not the lock file of a run.*remove it"):
        take(tmp_path)
    assert kind != "link" or (tmp_path / "victim").read_text() == "theirs"


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 300, b'{"pid": "one"}', b"[" * 3000])
def test_a_lock_that_says_nothing(tmp_path, content, monkeypatch):
    """Its maker was killed before it wrote its name."""
    monkeypatch.setattr(lock, "_SETTLED_S", 0.05)
    (tmp_path / LOCK_FILE).write_bytes(content)
    taken = take(tmp_path)
    assert Holder.parse((tmp_path / LOCK_FILE).read_bytes()).pid == os.getpid()
    taken.release()


def test_heartbeats_are_written_in_place(tmp_path):
    lock = take(tmp_path)
    before = (tmp_path / LOCK_FILE).read_bytes()
    os.utime(tmp_path / LOCK_FILE, (0, 0))
    lock.beat()
    assert len((tmp_path / LOCK_FILE).read_bytes()) == len(before) and (tmp_path / LOCK_FILE).stat().st_mtime > 1e9
    lock.release()


def test_inside_itself_and_in_other_ranks_nothing_is_taken(tmp_path, monkeypatch):
    with output_held(tmp_path), output_held(tmp_path):
        assert held_lock() is not None
    assert held_lock() is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    with output_held(tmp_path / "none"):
        assert held_lock() is None and not (tmp_path / "none").exists()


# what happens to the folder of a run


@pytest.fixture
def run(tmp_path):
    """A run in a folder with a checkpoint."""
    folder = tmp_path / "out"
    with output_held(folder):
        (folder / RUN_FILE).write_text("{}")
        write_checkpoint(folder / "checkpoint-2", 2)
        yield folder


def removed(folder: Path) -> None:
    folder.rename(folder.with_name("away"))


def emptied(folder: Path) -> None:
    (folder / RUN_FILE).unlink()


def swept(folder: Path) -> None:
    (folder / LOCK_FILE).unlink()


def replaced(folder: Path) -> None:
    removed(folder)
    folder.mkdir()


def replaced_by_another_run(folder: Path) -> None:
    replaced(folder)
    write_lock(folder)


def taken_over(folder: Path) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(vars(Holder.this_process(0)) | {"pid": 7, "host": "elsewhere"}))


@pytest.mark.parametrize(
    ("what", "expected", "left"),
    [
        (removed, "was removed", "There is no earlier"),
        (emptied, "was emptied", "checkpoint-2 is whole; the same"),
        (swept, "was emptied or replaced", "checkpoint-2 is whole; the same"),
        (replaced, "was emptied or replaced", "There is no earlier"),
        (replaced_by_another_run, "was taken over by process 4000000 on elsewhere", "There is no earlier"),
        (taken_over, "was taken over by process 7 on elsewhere", "checkpoint-2 is whole"),
    ],
)
def test_a_folder_that_is_lost(run, what, expected, left):
    check_output(run)
    what(run)
    sentence = rf"^--output_dir .*out {expected}.* while the run was going on. {left}"
    with pytest.raises(OutputLost, match=sentence):
        append_rows(run / "metrics.jsonl", [{"step": 1}])
    assert not (run / "metrics.jsonl").exists()
    with pytest.raises(OutputLost, match=sentence), writing(run, "x"):
        raise AssertionError("not begun")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more(run, monkeypatch, number):
    """A row is written whole or not at all, and the sentence names what is left."""
    append_rows(run / "metrics.jsonl", [{"step": 1}])
    really = os.write

    def short(descriptor, data):
        if len(data) > 10:
            return really(descriptor, bytes(data[:10]))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.write", short)
    reason = {errno.ENOSPC: "no space left on the disk", errno.EROFS: "is read-only now", errno.EIO: "Input/output"}
    with pytest.raises(
        OutputLost, match=rf"metrics.jsonl could not be written: .*{reason[number]}.*checkpoint-2 is whole"
    ):
        append_rows(run / "metrics.jsonl", [{"step": 2, "loss": 1.0}])
    monkeypatch.undo()
    assert read_rows(run / "metrics.jsonl") == [{"step": 1}]
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_half_a_row_of_a_killed_run_is_cut_before_the_next(run):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "answer": "\xc3')
    append_rows(run / "metrics.jsonl", [{"step": 2}])
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (run / "metrics.jsonl").write_bytes(b'half a row\n[1]\n{"step": "x"}\n{"step": 3}\n\xff\n')
    assert read_rows(run / "metrics.jsonl") == [{"step": 3}]


def test_errors_of_the_file_system_become_one_sentence(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(OutputLost, match=r"run.json could not be written: .*There is no earlier"), run_in(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "run.json"))
    with pytest.raises(OutputLost, match=r"no space left on the disk of .*out"), run_in(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), run_in(folder):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/somewhere/else")
    with pytest.raises(TrainingError, match="a process that reads data"), run_in(folder):
        raise SystemError("(Fatal) DataLoader process (pid 7) exited is killed by signal: Killed.")
    assert not list(folder.iterdir())


def test_a_checkpoint_that_is_not_whole_is_not_named(run):
    write_checkpoint(run / "checkpoint-4", 4)
    (run / "checkpoint-4" / "tensors.json").unlink()
    assert folder_guard.last_good_state(run).startswith("checkpoint-2 is whole")


def test_a_lock_is_not_of_the_processes_that_are_forked(tmp_path):
    lock = take(tmp_path)
    child = os.fork()
    if child == 0:
        OutputLock.release(lock)
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.lost() is None
    lock.release()
