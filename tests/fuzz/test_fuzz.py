"""Runs each harness for a few seconds, and checks that the judge finds known faults.

OARLOCK_FUZZ_SECONDS=600 makes them longer.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import harness as harness_module
import pytest
import run
from engines import with_hypothesis
from harness import Harness, keep, open_judge
from table import TABLE

from oarlock.errors import DataError

SECONDS = float(os.environ.get("OARLOCK_FUZZ_SECONDS", "20"))
PATIENCE = 10  # a slow machine is not a finding here
ENGINES = ["hypothesis", *(["atheris"] if importlib.util.find_spec("atheris") else [])]


@pytest.mark.parametrize("name", sorted(TABLE))
def test_no_input_causes_a_finding(name):
    harness = importlib.import_module(TABLE[name].module).HARNESS
    with open_judge(dataclasses.replace(harness, seconds=harness.seconds * PATIENCE)) as judge:
        with_hypothesis(judge, SECONDS, fixed=True)
    assert judge.executions >= len(harness.seeds())
    assert not judge.findings, "\n".join(keep(list(judge.findings.values()), run.ROOT / "build" / "fuzz" / name))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_long_form_counts_executions(engine):
    counts = run.run("safetensors", 2, engine)
    assert counts["findings"] == []
    assert counts["executions"] > counts["refused"] > 0
    assert counts["engine"] == engine


def _outside(data: bytes, folder: Path) -> None:
    (folder.parent / f"{folder.name}.outside").touch()
    (folder.parent / f"{folder.name}.outside").unlink()


def _connect(data: bytes, folder: Path) -> None:
    import socket

    with socket.socket() as sock:
        sock.connect_ex(("127.0.0.1", 9))


def _burn(data: bytes, folder: Path) -> None:
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (lambda data, folder: {}[data], "KeyError: b'x'"),
        (_outside, "open outside of its folder: "),
        (lambda data, folder: os.rename(folder, f"{folder}2") or os.rename(f"{folder}2", folder), "os.rename outside"),
        (lambda data, folder: subprocess.run([sys.executable, "-c", ""], check=True), "subprocess.Popen"),
        (_connect, "socket.connect"),
        (lambda data, folder: pickle.loads(pickle.dumps(Path)), "pickle.find_class"),
        (_burn, "slow: 0."),
    ],
)
def test_the_judge_finds_faults(target, what):
    with open_judge(Harness(target, list, seconds=0.1)) as judge:
        finding = judge(b"x")
        assert finding is not None
        assert finding.what.startswith(what)
        judge(b"x")
    assert len(judge.findings) == 1, "the same place is reported once"


def test_the_judge_finds_memory_use(monkeypatch):
    peaks = iter([1000.0, 1290.0, 1290.0, 1600.0])
    monkeypatch.setattr(harness_module, "_peak", lambda: next(peaks))
    with open_judge(Harness(lambda data, folder: None, list)) as judge:
        assert judge(b"x") is None
        finding = judge(b"y")
    assert finding is not None and finding.what == "large: 310 MB"


def test_the_judge_finds_leftover_processes(tmp_path):
    with open_judge(Harness(lambda data, folder: None, list)) as judge:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.communicate(b"\n")
    assert [finding.what.split(":")[0] for finding in judge.findings.values()] == ["a process is left"]


def test_files_read_by_an_import_are_not_a_finding(monkeypatch):
    monkeypatch.delitem(sys.modules, "plistlib", raising=False)
    with open_judge(Harness(lambda data, folder: importlib.import_module("plistlib"), list)) as judge:
        assert judge(b"x") is None


def test_the_judge_accepts_refusals_and_files_in_its_folder(tmp_path):
    def target(data: bytes, folder: Path) -> None:
        (folder / "a").write_bytes(data)
        (folder / "a").rename(folder / "b")
        raise DataError("no") if data == b"x" else ConnectionError

    with open_judge(Harness(target, list, refusals=(ConnectionError,))) as judge:
        assert judge(b"x") is judge(b"y") is None
    assert (judge.executions, judge.refused) == (2, 2)
    assert keep([], tmp_path / "kept") == []
