"""CPU ranks for tests: a program that imports Paddle once and forks the ranks of one scenario after the other, so that
a scenario costs half a second instead of four imports.

Scenarios are functions of cpu_failures.py and cpu_operations.py: what each rank does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LLM = Path(__file__).resolve().parents[2] / "llm"
RANKS = 4
# Ranks that still run by then are killed and the test fails; ranks that wait for a missing one have a longer timeout.
LIMIT_S, PATIENCE_S = 300.0, 900.0
SHORT_S = 4  # until a rank that is late is complained of, where that is what a scenario is about


# For tests.


class Driver:
    """This program, with a line of input and a line of output for each scenario."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(LLM), "OMP_NUM_THREADS": "1", "GLOG_minloglevel": "2"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, scenario: str) -> dict:
        self.process.stdin.write(scenario + "\n")
        self.process.stdin.flush()
        result = json.loads(self.process.stdout.readline())
        assert not result["left"], f"still running after {LIMIT_S} s: {result}"
        assert not result["memory_left"], result["memory_left"]
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=LIMIT_S)


@contextlib.contextmanager
def driver() -> Iterator[Driver]:
    """A driver; it must leave nothing in shared memory."""
    before = set(os.listdir("/dev/shm"))
    started = Driver()
    try:
        yield started
    finally:
        started.close()
    new = set(os.listdir("/dev/shm")) - before
    # Those of servers are other programs' (scripts/test.sh runs several at once).
    assert not {name for name in new if "oarlock" in name and not name.startswith(("oarlock-serve-", "oarlock-test-"))}


def read_errors(result: dict) -> list[str]:
    """The error lines of all ranks on stderr, as users see them."""
    return [
        line
        for text in result["stderr"]
        for line in text.splitlines()
        if line.startswith(("oarlock: error", "Traceback")) or "Error: " in line
    ]


# The program.


def run_scenarios() -> None:
    """Read scenarios, run each, and write its result."""
    from oarlock.environment.paddle_import import import_paddle

    import_paddle(1)
    import paddle.distributed  # noqa: F401
    from cpu_failures import FAILURES
    from cpu_operations import OPERATIONS

    scenarios = {each.__name__: each for each in (*FAILURES, *OPERATIONS)}
    for line in sys.stdin:
        print(json.dumps(run_ranks(scenarios[line.strip()])), flush=True)


def run_ranks(scenario) -> dict:
    sockets = [socket.socket() for _ in range(RANKS + 1)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    with tempfile.TemporaryDirectory() as name:
        limit, pids = time.monotonic() + LIMIT_S, []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, ports, Path(name), scenario)
            pids.append(pid)
        codes: dict[int, int] = {}
        while len(codes) < RANKS and time.monotonic() < limit:
            for rank in set(range(RANKS)) - set(codes):
                # Left uncollected, as a launcher may for a while: zombies must count as dead.
                ended = os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended:
                    codes[rank] = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            time.sleep(0.02)
        left = sorted(set(range(RANKS)) - set(codes))
        for rank in left:
            os.kill(pids[rank], signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        texts = [[(Path(name) / f"{rank}.{stream}").read_text() for rank in range(RANKS)] for stream in ("out", "err")]
    return {
        "codes": [codes.get(rank) for rank in range(RANKS)],
        "left": left,
        "memory_left": find_memory_users(),
        "stdout": texts[0],
        "stderr": texts[1],
    }


def find_memory_users() -> list[str]:
    """Our processes that still hold rank memory (this program itself never does)."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{descriptor.parts[2]}/stat").read_text().rpartition(")")[2].split()[1]
            if "oarlock-ranks" in os.readlink(descriptor) and int(parent) == os.getpid():
                found.append(str(descriptor))
    return found


def become_rank(rank: int, ports: list[int], folder: Path, scenario) -> None:
    # Two nodes on one machine, as two launchers would say it.
    endpoints = [f"127.0.0.{1 + i // 2}:{port}" for i, port in enumerate(ports[:RANKS])]
    os.environ |= {
        "PADDLE_MASTER": f"127.0.0.1:{ports[RANKS]}", "PADDLE_TRAINER_ID": str(rank), "PADDLE_TRAINERS_NUM": str(RANKS),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints), "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_LOCAL_SIZE": str(RANKS), "PADDLE_DISTRI_BACKEND": "gloo",
    }  # fmt: skip
    if hasattr(scenario, "environment"):
        os.environ |= scenario.environment(rank)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    atexit._clear()
    code = 1
    try:
        try:
            start(scenario)
            scenario(rank)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            show(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(scenario) -> None:
    import paddle.distributed

    from oarlock.cpu_ranks import process_group

    process_group.install(float(getattr(scenario, "patience_s", PATIENCE_S)))
    paddle.distributed.init_parallel_env()


def show(kind, error, trace) -> None:
    """Print an error as exit_with and Python do."""
    from oarlock.cpu_ranks.process_group import announce_failure
    from oarlock.errors import OarlockError, report

    if isinstance(error, OarlockError):
        announce_failure(str(error))
        report(error)
    else:
        sys.excepthook(kind, error, trace)


if __name__ == "__main__":
    run_scenarios()
