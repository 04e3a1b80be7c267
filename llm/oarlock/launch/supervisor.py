"""Run the ranks of a node: pass signals on to them, restart them when they fail, and return their exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from oarlock.environment.processes import read_process_fields
from oarlock.errors import EXIT_USAGE, printable
from oarlock.launch.command import RESUME_FLAG, LaunchCommand

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TERMINATED = 128 + signal.SIGTERM


class Supervisor:
    """Runs a launch command until it succeeds, is stopped, or has failed too often.

    SIGTERM, SIGHUP and Ctrl-C let the ranks save a checkpoint and end; a second Ctrl-C stops them without saving.

    Args:
        max_restart: how often the ranks are started again. Exit code 2 (wrong flags) is never retried.
    """

    def __init__(self, command: LaunchCommand, environment: Mapping[str, str], max_restart: int) -> None:
        self._argv, self._environment = list(command.argv), environment
        self._has_launcher, self._log_dir = command.has_launcher, command.log_dir
        self._max_restart = max_restart
        self._process: subprocess.Popen[bytes] | None = None
        self._stops = 0  # signals so far
        self._pending = False  # a signal that came before there was a process to pass it to
        self._stopped_early = False  # before there were ranks, which could have saved something

    def run(self) -> int:
        """Run the command and return the exit code for this program."""
        restarts = 0
        with handle_signals(self._stop_ranks, *_SIGNALS):
            while True:
                code = self._run_once()
                # Paddle's launcher restarts ranks only with an etcd master.
                if code in (0, EXIT_USAGE) or self._stops or restarts >= self._max_restart:
                    break
                restarts += 1
                log(f"the trainers ended with code {code}: restart {restarts} of {self._max_restart}")
                if restarts == 1:
                    self._argv.append(RESUME_FLAG)
        # The launcher returns 15 after SIGTERM, and 1 if it was still waiting for the other nodes.
        if self._stops and (code == signal.SIGTERM or (self._stopped_early and code)):
            code = TERMINATED
        if code:
            where = f"; their output is in {self._log_dir}/workerlog.*" if self._has_launcher else ""
            log(f"the trainers ended with code {code}{where}")
        return code

    def _run_once(self) -> int:
        """Start the command once and wait for it."""
        if self._stops:
            return TERMINATED
        # In a session of its own, so that Ctrl-C in a terminal reaches this program alone.
        process = subprocess.Popen(self._argv, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._process = process
        if self._pending:  # the signal came while the process started
            self._pending = False
            self._forward(signal.SIGTERM)
        code = exit_code(process.wait())
        self._process = None
        return code

    def _stop_ranks(self, number: int, _: FrameType | None) -> None:
        self._stops += 1
        if self._process is None:
            self._pending = True
        else:
            second_interrupt = number == signal.SIGINT and self._stops > 1
            self._forward(signal.SIGINT if second_interrupt else signal.SIGTERM)

    def _forward(self, number: signal.Signals) -> None:
        """Send a signal to the ranks, past Paddle's launcher.

        The launcher would pass it on to one rank after the other, kill those that have not saved after 30 seconds, and
        return 15 although they had.
        """
        assert self._process is not None
        launcher = self._process.pid
        ranks = [] if self._has_launcher else [launcher]
        for path in Path("/proc").glob("[0-9]*") if self._has_launcher else ():
            fields = read_process_fields(int(path.name))  # state, parent, process group, session, ...
            # A rank is a child that leads a session. The launcher's other children are helpers.
            if fields and fields[1] == str(launcher) and fields[3] == path.name:
                ranks.append(int(path.name))
        if not ranks:
            self._stopped_early = True  # still starting: there is nothing to save
            number, ranks = signal.SIGTERM, [launcher]
        else:
            log(f"passing {number.name} to {len(ranks)} trainer(s)")
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def handle_signals(handle: Callable[[int, FrameType | None], None], *signals: signal.Signals) -> Iterator[None]:
    """Handle signals inside the context. Ignored signals (SIGHUP under nohup) stay ignored."""
    before = {number: signal.getsignal(number) for number in signals}
    handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def exit_code(returncode: int) -> int:
    """Convert a return code of subprocess to that of a shell: 128 + N after signal N."""
    return returncode if returncode >= 0 else 128 - returncode


def log(message: str) -> None:
    """Write a line to stderr, where it does not mix with the output of the ranks."""
    print(printable(f"launch: {message}"), file=sys.stderr, flush=True)
