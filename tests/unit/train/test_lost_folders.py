"""Losing the folder of a run while it runs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from helpers import write_checkpoint
from oarlock.errors import OutputLost, TrainingError
from oarlock.train.output import folder_guard
from oarlock.train.output.folder_guard import RUN_FILE, check_output_dir, guard_run, guard_write
from oarlock.train.output.lock import LOCK_FILE, OutputLock, acquire_lock
from oarlock.train.output.lock_holder import Holder
from oarlock.train.reporters.row_file import append_rows, read_rows
from support.locks import write_lock


def remove_folder(folder: Path) -> None:
    folder.rename(folder.with_name("away"))


def empty_folder(folder: Path) -> None:
    (folder / RUN_FILE).unlink()


def delete_files(folder: Path) -> None:
    (folder / LOCK_FILE).unlink()


def replace_folder(folder: Path) -> None:
    remove_folder(folder)
    folder.mkdir()


def replaced_by_another_run(folder: Path) -> None:
    replace_folder(folder)
    write_lock(folder)


def take_over_lock(folder: Path) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(vars(Holder.this_process(0)) | {"pid": 7, "host": "elsewhere"}))


@pytest.mark.parametrize(
    ("what", "expected", "left"),
    [
        (remove_folder, "was removed", "There is no earlier"),
        (empty_folder, "was emptied", "checkpoint-2 is complete; the same"),
        (delete_files, "was emptied or replaced", "checkpoint-2 is complete; the same"),
        (replace_folder, "was emptied or replaced", "There is no earlier"),
        (replaced_by_another_run, "was taken over by process 4000000 on elsewhere", "There is no earlier"),
        (take_over_lock, "was taken over by process 7 on elsewhere", "checkpoint-2 is complete"),
    ],
)
def test_a_lost_folder_is_reported(run, what, expected, left):
    check_output_dir(run)
    what(run)
    sentence = rf"^--output_dir .*out {expected}.* during the run. {left}"
    with pytest.raises(OutputLost, match=sentence):
        append_rows(run / "metrics.jsonl", [{"step": 1}])
    assert not (run / "metrics.jsonl").exists()
    with pytest.raises(OutputLost, match=sentence), guard_write(run, "x"):
        raise AssertionError("not begun")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_full_disk_is_reported(run, monkeypatch, number):
    """A row is written completely or not at all, and the error names what remains."""
    append_rows(run / "metrics.jsonl", [{"step": 1}])
    really = os.write

    def short(descriptor, data):
        if len(data) > 10:
            return really(descriptor, bytes(data[:10]))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.write", short)
    reason = {errno.ENOSPC: "no space left on the disk", errno.EROFS: "has become read-only", errno.EIO: "Input/output"}
    with pytest.raises(
        OutputLost, match=rf"metrics.jsonl could not be written: .*{reason[number]}.*checkpoint-2 is complete"
    ):
        append_rows(run / "metrics.jsonl", [{"step": 2, "loss": 1.0}])
    monkeypatch.undo()
    assert read_rows(run / "metrics.jsonl") == [{"step": 1}]
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_partial_row_of_a_killed_run_is_removed(run):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "answer": "\xc3')
    append_rows(run / "metrics.jsonl", [{"step": 2}])
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (run / "metrics.jsonl").write_bytes(b'half a row\n[1]\n{"step": "x"}\n{"step": 3}\n\xff\n')
    assert read_rows(run / "metrics.jsonl") == [{"step": 3}]


def test_file_system_errors_become_one_sentence(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(OutputLost, match=r"run.json could not be written: .*There is no earlier"), guard_run(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / "run.json"))
    with pytest.raises(OutputLost, match=r"no space left on the disk of .*out"), guard_run(folder):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), guard_run(folder):
        raise FileNotFoundError(errno.ENOENT, "No such file", "/somewhere/else")
    with pytest.raises(TrainingError, match="a process that reads data"), guard_run(folder):
        raise SystemError("(Fatal) DataLoader process (pid 7) exited is killed by signal: Killed.")
    assert not list(folder.iterdir())


def test_an_incomplete_checkpoint_is_not_offered(run):
    write_checkpoint(run / "checkpoint-4", 4)
    (run / "checkpoint-4" / "tensors.json").unlink()
    assert folder_guard.describe_newest_checkpoint(run).startswith("checkpoint-2 is complete")


def test_forked_processes_do_not_inherit_the_lock(tmp_path):
    lock = acquire_lock(tmp_path)
    child = os.fork()
    if child == 0:
        OutputLock.release(lock)
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.find_loss() is None
    lock.release()
