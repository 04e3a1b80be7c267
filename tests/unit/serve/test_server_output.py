"""A server whose output can't be written continues, and so do the threads that read its children's output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oarlock.cli.commands import serve

PACKAGE = Path(__file__).resolve().parents[3] / "llm"
_SERVER = """
import subprocess, sys
from oarlock.environment.console import get_logger
from oarlock.serve.supervision.process_output import follow, drop_unwritable_output

CHILD = "for i in range(4000): print('x' * 100)"  # more than a pipe holds
with drop_unwritable_output():
    get_logger("test").info("before")
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    follow(child, "child", lambda: False).join()
    get_logger("test").info("after")
    print("lost", file=sys.stderr)
    open(sys.argv[1], "w").write(str(child.wait()))
"""


def _run(target: Path, **streams: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    return subprocess.run(
        [sys.executable, "-c", _SERVER, str(target)], env=environment, text=True, timeout=120, **streams
    )


@pytest.mark.parametrize("kind", ["full disk", "reader gone"])
def test_the_server_continues_if_its_output_is_closed(tmp_path: Path, kind: str) -> None:
    if kind == "full disk":
        place = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, place = os.pipe()
        os.close(reading)
    try:
        ended = _run(tmp_path / "child", stdout=place, stderr=place)
    finally:
        os.close(place)
    assert (tmp_path / "child").read_text() == "0"  # it was read to its end
    assert ended.returncode == 0


def test_writable_output_is_written(tmp_path: Path) -> None:
    ended = _run(tmp_path / "child", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = ended.stdout.splitlines()
    assert lines[0] == "oarlock: before" and lines[-1] == "oarlock: after"
    assert lines.count("child: " + "x" * 100) == 4000
    assert "lost" in ended.stderr


def test_a_hangup_during_startup_does_not_end_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def exporting(_: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 7

    monkeypatch.setattr(serve, "_serve_folder", exporting)
    monkeypatch.setattr(serve, "keep_private", lambda: None)  # of the process that runs the tests
    before = signal.getsignal(signal.SIGHUP)
    try:
        assert serve._run(serve.ServeFlags(folder=tmp_path)) == 7
    finally:
        signal.signal(signal.SIGHUP, before)
