"""The supervisor of `oarlock launch` with real processes: restarts, exit codes, signals, no leftover processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import ROOT, reset_signals
from oarlock.launch.command import RESUME_FLAG, LaunchCommand
from oarlock.launch.supervisor import Supervisor
from support.launched import LAUNCHER, SUPERVISE, find_leftover_processes, list_names, read_starts, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in find_leftover_processes(tmp_path):
        process.kill()


@pytest.fixture
def supervise(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a supervisor in a separate process, as a terminal or Slurm does."""
    started = []

    def start(kind: str, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, SUPERVISE, kind, *words], stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=reset_signals,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("codes", "max_restart", "expected", "num_starts"),
    [("0", 3, 0, 1), ("1", 0, 1, 1), ("1 247 0", 3, 0, 3), ("241", 2, 241, 3), ("2", 3, 2, 1)],
)
def test_failed_ranks_are_restarted(folder, capfd, codes, max_restart, expected, num_starts):
    words = [sys.executable, LAUNCHER, str(folder), "2", *codes.split()]
    command = LaunchCommand(words, has_launcher=True, log_dir="logs", num_ranks=2, degrees=None)
    assert Supervisor(command, os.environ, max_restart).run() == expected
    # Starting from scratch a second time would delete the checkpoints.
    assert [start[-1] == RESUME_FLAG for start in read_starts(folder)] == [i > 0 for i in range(num_starts)]
    errors = capfd.readouterr().err
    assert errors.count("launch: the trainers ended with code") == num_starts - (expected == 0)
    assert errors.count("their output is in logs/workerlog.*") == (expected != 0)


def test_a_rank_killed_by_a_signal_has_the_exit_code_of_a_shell(capfd):
    words = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    command = LaunchCommand(words, has_launcher=False, log_dir="logs", num_ranks=1, degrees=None)
    assert Supervisor(command, os.environ, 0).run() == 137
    assert capfd.readouterr().err == "launch: the trainers ended with code 137\n", "one process has no logs of ranks"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks_and_not_the_launcher(folder, supervise, number):
    process = supervise("launcher", LAUNCHER, str(folder), "2")
    wait_until(lambda: len(list_names(folder, "ready-*")) == 2, "two ranks")
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal: to all processes of the group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "passing SIGTERM to 2 trainer(s)" in errors
    assert [(folder / name).read_text() for name in list_names(folder, "saved-*")] == ["SIGTERM", "SIGTERM"]
    assert len(read_starts(folder)) == 1 and not find_leftover_processes(folder)


def test_a_second_ctrl_c_stops_the_ranks_without_saving(folder, supervise):
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: pathlib.Path(sys.argv[1], 'saving').touch())\n"
        "pathlib.Path(sys.argv[1], 'ready-0').touch()\n"
        "while True: time.sleep(1)"
    )
    process = supervise("alone", "-c", code, str(folder))
    wait_until((folder / "ready-0").exists, "the rank")
    process.send_signal(signal.SIGINT)
    wait_until((folder / "saving").exists, "the first signal to arrive")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "passing SIGTERM to 1 trainer(s)" in errors and "passing SIGINT to 1 trainer(s)" in errors
    assert process.returncode != 0 and not find_leftover_processes(folder)


def test_a_signal_before_ranks_exist_ends_the_launch(folder, supervise):
    process = supervise("launcher", LAUNCHER, str(folder), "0")
    wait_until((folder / "ready-launcher").exists, "the launcher")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and len(read_starts(folder)) == 1 and not find_leftover_processes(folder)


def test_a_single_process_gets_the_signal_itself(folder, supervise):
    """Its exit code is passed on (1 here), and it is not restarted."""
    process = supervise("alone", LAUNCHER, str(folder), "0")
    wait_until((folder / "ready-launcher").exists, "the process")
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert "passing SIGTERM to 1 trainer(s)" in errors and process.returncode == 1 and len(read_starts(folder)) == 1


def test_an_ignored_signal_stays_ignored(folder, supervise):
    """As under nohup."""
    words = [sys.executable, SUPERVISE, "launcher", LAUNCHER, str(folder), "2"]
    process = subprocess.Popen(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *words])
    try:
        wait_until(lambda: len(list_names(folder, "ready-*")) == 2, "two ranks")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert process.poll() is None and not list_names(folder, "saved-*")
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


def test_paddles_launcher_returns_the_code_of_the_failed_rank_and_leaves_nothing(folder):
    """Rank 0 fails while rank 1 would run for minutes."""
    script = folder / "train.py"
    script.write_text("import os, sys, time\nif os.environ['PADDLE_TRAINER_ID'] == '0': sys.exit(7)\ntime.sleep(300)\n")
    options = ["--device", "cpu", "--gpus", "2", "--log_dir", str(folder / "log")]
    command = [sys.executable, str(ROOT / "llm" / "launch.py"), *options, str(script), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 7, result.stderr
    assert f"the trainers ended with code 7; their output is in {folder}/log/workerlog.*" in result.stderr
    assert list_names(folder / "log", "workerlog.*") == ["workerlog.0", "workerlog.1"]
    assert not find_leftover_processes(folder)
