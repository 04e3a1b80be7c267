"""Detecting dead ranks, and reporting the first failure of a run: it stops all ranks, and is printed once."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

from oarlock.cpu_ranks.shared_memory import PAGE, MappedArea, MemoryFile, fence
from oarlock.environment.processes import process_start_time
from oarlock.errors import OarlockError, StoppedWithOthers, report

CHECK_INTERVAL_S = 0.5  # a waiting rank checks the others this often
_WATCHDOG_INTERVAL_S = 1.0  # so does the watchdog thread, whatever the main thread does
_GRACE_S = 10.0  # for the main thread to end by itself after a failure
_REPORTER_S = 4.0  # for the rank that has to report a rank's death
_YIELDS = 2  # with more ranks than cores, spinning takes time from the rank that is waited for

MAX_SHARED_BYTES = 16 << 20  # of one object in an all_gather_objects before groups exist
BOARD_BYTES = 2 * PAGE
# Words on every rank's board (a page of its memory that all ranks can read).
_STATE = 0
_RUNNING, _FINISHED = 1, 2
# Words and text on rank 0's board: the first failure of the run. Written under the lock.
_FAILED, _KIND, _REPORTER, _REPORTED, _LENGTH = 16, 17, 18, 19, 20
_ERROR, _DEATH = 1, 2
_TEXT = PAGE


# Returns what a rank is doing and which ranks did not arrive, for error messages.
Describe = Callable[[], tuple[str, list[int]]]


class CommunicationError(OarlockError):
    """A collective or message failed: ranks disagree, or one is late or gone."""


class Failure(NamedTuple):
    """The first failure of a run."""

    rank: int
    kind: int
    reporter: int  # the rank that reports a death
    message: str


class RankProcess(NamedTuple):
    """A rank as seen by the others."""

    pid: int
    started: int
    memory: MemoryFile
    board: MappedArea


def open_board(memory: MemoryFile) -> MappedArea:
    """Map this rank's board in its new memory file, before others can see it. From then on the rank counts as alive."""
    board = memory.map(memory.reserve(BOARD_BYTES), BOARD_BYTES)
    board.publish(_STATE, _RUNNING)
    return board


class FailureDetector:
    """The processes of a run, and the first failure among them."""

    def __init__(self, rank: int, members: list[RankProcess], timeout_s: float) -> None:
        self.rank, self.members, self.timeout_s, self.pid = rank, members, timeout_s, os.getpid()
        self._record, self._lock_file = members[0].board, members[0].memory.descriptor
        self._lock, self._over = threading.Lock(), threading.Event()
        self._own_error: OarlockError | None = None
        self._watching: threading.Thread | None = None
        self._previous_hook = sys.excepthook

    def start(self) -> None:
        """Report uncaught errors to the other ranks, and a regular end of the program."""
        atexit.register(self.mark_finished)
        sys.excepthook = self._excepthook

    def start_watchdog(self) -> None:
        """Check the other ranks from now on, also while this rank does not wait for them."""
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="oarlock-ranks", daemon=True)
            self._watching.start()

    def mark_finished(self) -> None:
        """Record that this rank ends regularly, so the others don't take it for dead."""
        if os.getpid() == self.pid:  # a forked child inherits exit handlers
            self._over.set()
            self.members[self.rank].board.publish(_STATE, _FINISHED)

    # Waiting.

    def wait_until(
        self,
        area: MappedArea,
        index: int,
        arrived: Callable[[int], bool],
        rank: int,
        describe: Describe,
        timeout_s: float | None = None,
    ) -> None:
        """Wait until the word that `rank` publishes at an index has a wanted value.

        Args:
            arrived: whether a value is the wanted one.
            timeout_s: default: that of the run; may be infinite.

        Raises:
            StoppedWithOthers: another rank failed or died.
            CommunicationError: timeout, or the rank has ended.
        """
        for _ in range(_YIELDS):
            if arrived(area.words[index]):
                return fence()
            os.sched_yield()
        now = time.monotonic()
        deadline, look = now + (self.timeout_s if timeout_s is None else timeout_s), now + CHECK_INTERVAL_S
        while not arrived(value := area.words[index]):
            now = time.monotonic()
            if now >= min(look, deadline):
                look = now + CHECK_INTERVAL_S
                gone = self.members[rank].board.words[_STATE] == _FINISHED
                self.check()
                if arrived(area.words[index]):  # what it did just before its end counts
                    break
                if gone:
                    what = f"rank {self.rank} waits for it in {describe()[0]}"
                    raise self.fail(f"rank {rank} has ended its program while {what}")
                if now >= deadline:
                    raise self._timeout_error(describe)
            area.sleep_while(index, value, max(0.001, min(look, deadline) - now))
        return fence()

    def poll_until(self, ready: Callable[[], bool], describe: Describe) -> None:
        """Wait for a condition by polling. For rare cases that are not a single word; errors as in wait_until()."""
        now = time.monotonic()
        deadline, look = now + self.timeout_s, now + CHECK_INTERVAL_S
        while not ready():
            now = time.monotonic()
            if now >= min(look, deadline):
                look = now + CHECK_INTERVAL_S
                self.check()
                if now >= deadline:
                    raise self._timeout_error(describe)
            time.sleep(0.001)

    def _timeout_error(self, describe: Describe) -> OarlockError:
        what, missing = describe()
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        return self.fail(f"rank {self.rank} waited {self.timeout_s:,.0f} s in {what}; {ranks} did not arrive")

    def check(self) -> None:
        """Check that no rank failed or died.

        Raises:
            StoppedWithOthers: one did.
        """
        failure = self.failure() or self._find_dead_rank()
        if failure:
            raise self._stop_silently(failure)

    # Failing.

    @property
    def failed(self) -> bool:
        """Whether a rank failed."""
        return self._record.words[_FAILED] != 0

    def failure(self) -> Failure | None:
        """The first failure of the run, or None."""
        words = self._record.words
        if not self.failed:
            return None
        fence()
        length, reporter = min(words[_LENGTH], PAGE), min(words[_REPORTER], len(self.members) - 1)
        text = self._record.bytes[_TEXT : _TEXT + length].tobytes().decode("utf-8", errors="replace")
        return Failure(words[_FAILED] - 1, words[_KIND], reporter, text)

    def fail(self, message: str) -> OarlockError:
        """Record a failure that this rank has found. Returns the error to raise; it is silent if another was first."""
        if self._record_failure(self.rank, _ERROR, self.rank, message):
            self._own_error = CommunicationError(message)
            return self._own_error
        failure = self.failure()
        return self._stop_silently(failure) if failure else CommunicationError(message)

    def announce(self, message: str) -> bool:
        """Report to all ranks that this one fails. False if another was first."""
        return os.getpid() == self.pid and self._record_failure(self.rank, _ERROR, self.rank, message)

    def _record_failure(self, rank: int, kind: int, reporter: int, message: str) -> bool:
        text = message.encode()[:PAGE]
        with self._exclusive():
            words = self._record.words
            if words[_FAILED]:
                return False
            words[_KIND], words[_REPORTER], words[_LENGTH] = kind, reporter, len(text)
            self._record.bytes[_TEXT : _TEXT + len(text)] = memoryview(text)
            self._record.publish(_FAILED, rank + 1)
            return True

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """A lock for one rank and thread at a time. The kernel releases the lock of a process that dies."""
        with self._lock:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1)
            try:
                yield
            finally:
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1)

    def _is_running(self, rank: int) -> bool:
        member = self.members[rank]
        return process_start_time(member.pid) == member.started and member.board.words[_STATE] != _FINISHED

    def _find_dead_rank(self) -> Failure | None:
        for rank, member in enumerate(self.members):
            # Look at the process first: a regular end in between must count.
            if process_start_time(member.pid) != member.started and member.board.words[_STATE] == _RUNNING:
                reporter = next((i for i in range(len(self.members)) if self._is_running(i)), self.rank)
                pid = member.pid
                message = f"rank {rank} (pid {pid}) died without an error message (killed, perhaps out of memory)"
                self._record_failure(rank, _DEATH, reporter, message)
                return self.failure()
        return None

    def _stop_silently(self, failure: Failure) -> StoppedWithOthers:
        patience = time.monotonic() + _REPORTER_S
        while not self._report_death(failure, time.monotonic() > patience):
            time.sleep(0.05)  # its launcher may end the reporting rank as soon as another rank is gone
        return StoppedWithOthers(f"rank {failure.rank} failed: {failure.message}")

    def _report_death(self, failure: Failure, take_over: bool) -> bool:
        """Report a death if this rank has to. Returns whether it has been reported."""
        words = self._record.words
        if failure.kind == _ERROR or words[_REPORTED]:
            return True
        if failure.reporter != self.rank and not take_over and self._is_running(failure.reporter):
            return False
        with self._exclusive():
            mine = not words[_REPORTED]
            words[_REPORTED] = 1
        if mine:
            print(f"\noarlock: error: {failure.message}; all ranks stop", file=sys.stderr, flush=True)
        return True

    def _watch(self) -> None:
        """In a thread: end this process if the run has failed and the main thread does not notice."""
        noticed = 0.0
        while not self._over.wait(_WATCHDOG_INTERVAL_S):
            failure = self.failure() or self._find_dead_rank()
            if not failure:
                continue
            noticed = noticed or time.monotonic()
            waited = time.monotonic() - noticed
            self._report_death(failure, waited > _REPORTER_S)
            if waited > _GRACE_S:
                # In a thread, because the main thread may hold the lock of a stream forever.
                flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
                flush.start()
                flush.join(1.0)
                os._exit(1)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Handle an uncaught error: report it to the other ranks, or be silent if another rank failed first."""
        if os.getpid() != self.pid:
            return self._previous_hook(kind, error, trace)
        if isinstance(error, StoppedWithOthers):
            return None
        self.announce(f"{kind.__name__}: {error}")
        failure = self.failure()
        if failure and failure.rank != self.rank:
            self._stop_silently(failure)
        elif self._own_error:
            report(self._own_error)  # Paddle wraps errors that are raised in a backward pass
        else:
            self._previous_hook(kind, error, trace)
        return None
