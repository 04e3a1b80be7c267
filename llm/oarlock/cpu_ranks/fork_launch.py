"""Start many CPU ranks on this machine: import Paddle in one process, then fork the ranks.

Each rank has the variables that `paddle.distributed.launch` would set. Importing PaddleNLP takes seconds of CPU time;
this way it happens once instead of once per rank.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from oarlock.cpu_ranks.meeting_point import MeetingPoint, connect_pairs, set_inherited
from oarlock.environment.signals import die_with_parent

_POLL_S = 0.05
_GRACE_S = 30.0  # for the other ranks to end after one failed


def launch(
    num_ranks: int, main: Callable[[], int], log_dir: str | Path, timeout_s: float | None = None, quiet: bool = False
) -> list[int]:
    """Run main() in num_ranks forked processes and wait for all of them.

    Rank n writes to log_dir/workerlog.n. Rank 0 writes to this process's stdout and stderr, unless `quiet`. When a rank
    fails, the others have 30 seconds to end by themselves.

    Args:
        num_ranks: number of processes. This process must not have chosen a device or started threads yet.
        main: returns the exit code.
        timeout_s: all ranks are killed after this time.

    Returns:
        The exit codes in rank order; -N for a rank that was ended by signal N.
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:  # finds ports on which no process listens
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ranks + 1)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    key, pairs = os.urandom(32), connect_pairs(num_ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, int] = {}
    try:
        for rank in range(num_ranks):
            pid = os.fork()
            if pid == 0:
                log = None if rank == 0 and not quiet else log_dir / f"workerlog.{rank}"
                _set_up_rank(rank, endpoints, log)
                _inherit(rank, key, pairs)
                _run(main)
            children[pid] = rank
        _close(*itertools.chain(*pairs))
        return _wait(children, num_ranks, timeout_s)
    finally:
        _close(*itertools.chain(*pairs))
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _set_up_rank(rank: int, endpoints: list[str], log: Path | None) -> None:
    """In the child: set the environment and the output of a rank."""
    die_with_parent()
    atexit._clear()  # these are the parent's exit handlers
    *ranks, master = endpoints
    os.environ |= {
        "PADDLE_MASTER": master,
        "PADDLE_GLOBAL_SIZE": str(len(ranks)),
        "PADDLE_LOCAL_SIZE": str(len(ranks)),
        "PADDLE_GLOBAL_RANK": str(rank),
        "PADDLE_LOCAL_RANK": str(rank),
        "PADDLE_NNODES": "1",
        "PADDLE_CURRENT_ENDPOINT": ranks[rank],
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(len(ranks)),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(ranks),
        "PADDLE_DISTRI_BACKEND": "gloo",  # Paddle's name for the CPU backend
    }
    if "paddle" in sys.modules:  # set from the parent's environment when PaddleNLP was imported
        sys.modules["paddle.distributed.parallel"].__dict__["_global_parallel_env"] = None
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)


def _inherit(rank: int, key: bytes, pairs: Sequence[tuple[socket.socket, socket.socket]]) -> None:
    """In the child: keep the sockets of this rank only, so the other ranks notice when it ends."""
    mine: dict[int, socket.socket] = {}
    for other, (first, second) in enumerate(pairs, start=1):
        if rank == 0:
            mine[other] = first
            second.close()
        elif rank == other:
            mine[0] = second
            first.close()
        else:
            _close(first, second)
    set_inherited(MeetingPoint(key, mine))


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        each.close()


def _run(main: Callable[[], int]) -> None:
    """In the child: run main() and exit, without the parent's exit handlers."""
    from oarlock.errors import exit_with

    code = 1
    try:
        exit_with(main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # prints the error and reports it to the other ranks
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(children: dict[int, int], num_ranks: int, timeout_s: float | None) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s if timeout_s else None
    while children:
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == 0:
                continue
            code = os.waitstatus_to_exitcode(status)
            codes[children.pop(child)] = code
            if code:
                soon = time.monotonic() + _GRACE_S
                deadline = min(deadline, soon) if deadline else soon
        if deadline and time.monotonic() > deadline:
            for child in children:
                os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(_POLL_S)
    return [codes[rank] for rank in range(num_ranks)]
