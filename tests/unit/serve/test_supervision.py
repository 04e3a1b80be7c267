"""Supervision without a Triton: restart delays, ports, folders, administration, flags."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.cli.main import main
from oarlock.environment.processes import Peer
from oarlock.errors import ConfigError, EnvironmentProblem, OarlockError
from oarlock.serve.config import FrontConfig
from oarlock.serve.supervision import restarting_process as part_module
from oarlock.serve.supervision.admin_client import find_server, send_order
from oarlock.serve.supervision.admin_socket import AdminServer
from oarlock.serve.supervision.guardian import clean_up
from oarlock.serve.supervision.listening import Listening
from oarlock.serve.supervision.private_memory import SHARED_MEMORY, close_memory, make_memory_filter
from oarlock.serve.supervision.restarting_process import LONGEST_PAUSE, RestartingProcess
from oarlock.serve.supervision.run_folder import make_run_folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# parts


def test_restart_delays_grow_and_reset_after_a_healthy_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(part_module.time, "monotonic", lambda: now[0])
    part = RestartingProcess("it", lambda: subprocess.Popen(["true"], text=True))
    part.start()
    pauses = []
    for _ in range(10):
        part.process.wait()
        pauses.append(part.note_end())
        assert part.waits and not part.restart_if_due()
        now[0] += pauses[-1]
        assert part.restart_if_due() and not part.waits
    assert pauses == [min(0.2 * 2**i, LONGEST_PAUSE) for i in range(10)] and part.restarts == 10
    part.note_up()
    now[0] += 59
    assert part.note_end() == LONGEST_PAUSE
    now[0] += 30
    assert part.restart_if_due()
    part.note_up()
    now[0] += 61
    assert part.note_end() == 0.2
    part.kill()


def test_describe_end():
    part = RestartingProcess("it", lambda: subprocess.Popen(["sleep", "600"], text=True))
    part.start()
    assert part.runs
    part.kill()
    assert not part.runs and part.describe_end() == "signal 9"


def test_a_guardian_ends_the_last_registered_session():
    prefix, words = f"oarlock-test-{os.getpid()}-", ["sleep", "600"]
    first, last = (subprocess.Popen(words, start_new_session=True) for _ in range(2))
    (SHARED_MEMORY / f"{prefix}a").touch()
    guardian = [sys.executable, "-m", "oarlock.serve.supervision.guardian", prefix]
    subprocess.run(guardian, input=f"{first.pid}\n0\n{last.pid}\n", text=True, check=True, timeout=60)
    assert last.wait(60) == -9 and first.poll() is None and not (SHARED_MEMORY / f"{prefix}a").exists()
    clean_up({first.pid}, prefix, [])
    assert first.wait(60) == -9


# memory, ports, folders


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a filter of Linux")
def test_boost_can_not_make_shared_memory_public():
    """The system calls that Boost makes, in a process with the filter; other modes and calls keep working."""
    name = f"oarlock-test-{os.getpid()}-b"
    code = f"""
import os
os.umask(0o077)
file = os.open("/dev/shm/{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
try:
    os.fchmod(file, 0o644)
except PermissionError:
    print("refused")
print(oct(os.fstat(file).st_mode & 0o777))
os.fchmod(file, 0o400)
print(oct(os.fstat(file).st_mode & 0o777))
"""
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], preexec_fn=make_memory_filter(), capture_output=True, text=True, check=True
        )
        assert run.stdout.split() == ["refused", "0o600", "0o400"]
        (SHARED_MEMORY / name).chmod(0o644)
        close_memory(name)
        assert stat.S_IMODE((SHARED_MEMORY / name).stat().st_mode) == 0o600
    finally:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def test_ports_are_opened_once_and_ports_in_use_are_reported():
    config = FrontConfig(
        openai_port=free_port(), rest_port=free_port(), grpc_port=free_port(), metrics_port=free_port()
    )
    listening = Listening(config)
    assert set(listening.descriptors) == {"openai", "rest", "grpc", "metrics"}
    with socket.create_connection(("127.0.0.1", config.rest_port), timeout=5):  # waits for a front
        pass
    with pytest.raises(EnvironmentProblem, match=r"--port \d+ on 127.0.0.1: the port is taken"):
        Listening(replace(config, rest_port=free_port(), grpc_port=free_port(), metrics_port=free_port()))
    listening.close()
    Listening(config).close()
    with pytest.raises(ConfigError, match="--metrics-port 5: --grpc-port has the same port"):
        Listening(replace(config, grpc_port=5, rest_port=6, metrics_port=5))
    with pytest.raises(ConfigError, match="--rest-port 70000: it must be from 1 to 65535"):
        Listening(replace(config, rest_port=70000))


def test_the_server_folder(tmp_path, monkeypatch):
    with contextlib.ExitStack() as opened:
        run = make_run_folder(opened)
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert not run.exists()
    deep = tmp_path / ("long" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))  # too long for a socket
    with contextlib.ExitStack() as opened:
        assert len(str(make_run_folder(opened))) < 60


# administration


@pytest.fixture
def admin():
    """A server that records the actions it carries out."""
    done = []

    def fail(model):
        raise ConfigError(f"no {model}")

    def crash(model):
        raise ZeroDivisionError("a fault")

    actions = {"do": lambda model: done.append(model) or {"text": f"did {model}"}, "fail": fail, "crash": crash}
    with tempfile.TemporaryDirectory() as folder, AdminServer(Path(folder) / "admin", actions) as server:
        yield Path(folder) / "admin", done, server


def test_admin_actions(admin):
    path, done, _ = admin
    threads = threading.active_count()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert send_order(path, "do", "m") == {"text": "did m"} and done == ["m"]
    for name, words in (("fail", "no m"), ("else", "there is no 'else'"), ("crash", "ZeroDivisionError: a fault")):
        with pytest.raises(OarlockError, match=words):
            send_order(path, name, "m")
    with pytest.raises(EnvironmentProblem, match="no server answers there"):
        send_order(path.with_name("none"), "do")
    for _ in range(20):
        assert send_order(path, "do", "again") == {"text": "did again"}
    assert threading.active_count() < threads + 10


@settings(max_examples=40)
@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(lambda x: json.dumps(x).encode())))  # fmt: skip
def test_unknown_admin_actions_are_refused(line):
    server = AdminServer(Path("/nowhere"), {})
    assert set(server.answer(line)) == {"error"}
    server._socket.close()


def open_admin_socket():
    return [thread for thread in threading.enumerate() if thread.name == "admin-client"]


def test_silent_and_flooding_clients_do_not_block_others(admin):
    path, _, _ = admin
    silent = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    for one in silent:
        one.connect(str(path))
    with socket.socket(socket.AF_UNIX) as loud, contextlib.suppress(OSError):
        loud.connect(str(path))
        loud.sendall(b"x" * 100_000)
    assert send_order(path, "do", "m") == {"text": "did m"}
    for one in silent:
        one.close()
    deadline = time.monotonic() + 60
    while open_admin_socket() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not open_admin_socket()


def test_other_users_are_refused(admin, monkeypatch):
    path, done, _ = admin
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr("oarlock.serve.supervision.admin_socket.find_peer", lambda _: Peer(1, 54321))
    with pytest.raises(OarlockError, match="only from its own user"):
        send_order(path, "do", "m")
    assert not done


def test_a_running_server_is_found(admin, monkeypatch, capsys):
    path, _, _ = admin
    monkeypatch.setattr(
        "oarlock.serve.supervision.admin_client.find_admin_sockets", lambda: [path.with_name("dead"), path]
    )
    assert find_server(None) == path
    monkeypatch.setattr("oarlock.serve.supervision.admin_client.find_admin_sockets", lambda: [path, path])
    with pytest.raises(ConfigError, match="2 servers run here"):
        find_server(None)
    monkeypatch.setattr("oarlock.serve.supervision.admin_client.find_admin_sockets", list)
    with pytest.raises(SystemExit) as ended:
        main(["admin", "status"])
    assert ended.value.code == 2 and "no server of this user runs here" in capsys.readouterr().err
    for words in (["admin", "load"], ["admin", "status", "m"], ["admin", "else"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2


# flags


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--triton-host", "0.0.0.0"], "Triton has no port any more"),
        (["--admin-key-file", "x"], "oarlock admin reload"),
        (["--tls-key", "x"], "--tls-certificate and --tls-key go together"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--max-open", "-1"], "must lie in [0, 2147483647]"),
    ],
)
def test_flags_are_checked_before_the_start(tmp_path, capsys, words, said):
    before = os.umask(0o022)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["serve", str(tmp_path), *words])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    finally:
        os.umask(before)
