"""Who of the run is alive, and what went wrong first: one failure stops all ranks of this machine and is told once."""

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

from oarlock.cpu_ranks.shared_memory import PAGE, Area, Memory, fence
from oarlock.environment.processes import process_start_time
from oarlock.errors import OarlockError, StoppedWithOthers, report

SLICE_S = 0.5  # a waiting rank looks after the others this often
_WATCH_S = 1.0  # and so does the watchdog, whatever the main thread does
_GRACE_S = 10.0  # for the main thread to end by itself once something failed
_SPEAKER_S = 4.0  # for the rank whose turn it is to tell of a silent death
_YIELDS = 2  # ranks outnumber cores, so spinning only takes time from the one waited for

MAX_SHARED_BYTES = 16 << 20  # of one value that a rank shares with all before there are groups
BOARD_BYTES = 2 * PAGE
# Words on every rank's board.
_STATE = 0
_RUNNING, _GOODBYE = 1, 2
# Words and text on rank 0's board, written under the lock: the run's first failure.
_FAILED, _KIND, _SPEAKER, _SPOKEN, _LENGTH = 16, 17, 18, 19, 20
_TOLD, _DIED = 1, 2
_TEXT = PAGE


# What a rank is doing, and the ranks that did not come to it; asked for when an error is to be told.
Describe = Callable[[], tuple[str, list[int]]]


class CommunicationError(OarlockError):
    """A group can't do what was asked: ranks disagree, one does not come, or one is gone."""


class Failure(NamedTuple):
    """The first one of the run."""

    rank: int
    kind: int
    speaker: int  # who tells of it when the rank itself can't
    message: str


class Member(NamedTuple):
    """A rank as the others see it."""

    pid: int
    started: int
    memory: Memory
    board: Area


def open_board(memory: Memory) -> Area:
    """This rank's board in its new memory file (before the others can see it): from here on it counts as alive."""
    board = memory.map(memory.reserve(BOARD_BYTES), BOARD_BYTES)
    board.publish(_STATE, _RUNNING)
    return board


class Run:
    """The ranks of this run, their memories, and the run's first failure."""

    def __init__(self, rank: int, members: list[Member], timeout_s: float) -> None:
        self.rank, self.members, self.timeout_s, self.pid = rank, members, timeout_s, os.getpid()
        self._record, self._lock_file = members[0].board, members[0].memory.descriptor
        self._lock, self._over = threading.Lock(), threading.Event()
        self._own_error: OarlockError | None = None
        self._watching: threading.Thread | None = None
        self._previous_hook = sys.excepthook

    def start(self) -> None:
        """Tell the others of a failure, and say goodbye at the end."""
        atexit.register(self.goodbye)
        sys.excepthook = self._excepthook

    def watch(self) -> None:
        """From now on look after the others also while this rank does not wait for them."""
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, name="oarlock-ranks", daemon=True)
            self._watching.start()

    def goodbye(self) -> None:
        """This rank ends as it should; nobody takes it for dead."""
        if os.getpid() == self.pid:  # a forked child inherits exit handlers
            self._over.set()
            self.members[self.rank].board.publish(_STATE, _GOODBYE)

    # Waiting.

    def wait_until(
        self,
        area: Area,
        index: int,
        arrived: Callable[[int], bool],
        rank: int,
        describe: Describe,
        timeout_s: float | None = None,
    ) -> None:
        """Wait for a word that `rank` publishes.

        Args:
            arrived: whether a value of the word is what is waited for.
            timeout_s: default: the run's; may be infinite.

        Raises:
            StoppedWithOthers: another rank failed or died.
            CommunicationError: the time is up, or the rank has ended.
        """
        for _ in range(_YIELDS):
            if arrived(area.words[index]):
                return fence()
            os.sched_yield()
        now = time.monotonic()
        deadline, look = now + (self.timeout_s if timeout_s is None else timeout_s), now + SLICE_S
        while not arrived(value := area.words[index]):
            now = time.monotonic()
            if now >= min(look, deadline):
                look = now + SLICE_S
                gone = self.members[rank].board.words[_STATE] == _GOODBYE
                self.check()
                if arrived(area.words[index]):  # what it did just before it left counts
                    break
                if gone:
                    what = f"rank {self.rank} waits for it in {describe()[0]}"
                    raise self.fail(f"rank {rank} has ended its program while {what}")
                if now >= deadline:
                    raise self._too_late(describe)
            area.sleep_while(index, value, max(0.001, min(look, deadline) - now))
        return fence()

    def poll_until(self, ready: Callable[[], bool], describe: Describe) -> None:
        """Wait for what no single word tells; for rare cases. Arguments and errors as in wait_until."""
        now = time.monotonic()
        deadline, look = now + self.timeout_s, now + SLICE_S
        while not ready():
            now = time.monotonic()
            if now >= min(look, deadline):
                look = now + SLICE_S
                self.check()
                if now >= deadline:
                    raise self._too_late(describe)
            time.sleep(0.001)

    def _too_late(self, describe: Describe) -> OarlockError:
        what, missing = describe()
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        return self.fail(f"rank {self.rank} waited {self.timeout_s:,.0f} s in {what}; {ranks} did not arrive")

    def check(self) -> None:
        """Make sure that nobody failed or died.

        Raises:
            StoppedWithOthers: somebody did.
        """
        failure = self.failure() or self._look_for_dead()
        if failure:
            raise self._stopped(failure)

    # Failing.

    @property
    def failed(self) -> bool:
        """Whether somebody did."""
        return self._record.words[_FAILED] != 0

    def failure(self) -> Failure | None:
        """The run's first one, or None."""
        words = self._record.words
        if not self.failed:
            return None
        fence()
        length, speaker = min(words[_LENGTH], PAGE), min(words[_SPEAKER], len(self.members) - 1)
        text = self._record.bytes[_TEXT : _TEXT + length].tobytes().decode("utf-8", errors="replace")
        return Failure(words[_FAILED] - 1, words[_KIND], speaker, text)

    def fail(self, message: str) -> OarlockError:
        """What to raise for a failure that this rank has found: its own error, or silence when another was first."""
        if self._enter(self.rank, _TOLD, self.rank, message):
            self._own_error = CommunicationError(message)
            return self._own_error
        failure = self.failure()
        return self._stopped(failure) if failure else CommunicationError(message)

    def announce(self, message: str) -> bool:
        """Tell all ranks that this one fails; False when another was first."""
        return os.getpid() == self.pid and self._enter(self.rank, _TOLD, self.rank, message)

    def _enter(self, rank: int, kind: int, speaker: int, message: str) -> bool:
        text = message.encode()[:PAGE]
        with self._exclusive():
            words = self._record.words
            if words[_FAILED]:
                return False
            words[_KIND], words[_SPEAKER], words[_LENGTH] = kind, speaker, len(text)
            self._record.bytes[_TEXT : _TEXT + len(text)] = memoryview(text)
            self._record.publish(_FAILED, rank + 1)
            return True

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One rank and thread at a time; the kernel frees the lock of one that dies."""
        with self._lock:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX, 1)
            try:
                yield
            finally:
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1)

    def _running(self, rank: int) -> bool:
        member = self.members[rank]
        return process_start_time(member.pid) == member.started and member.board.words[_STATE] != _GOODBYE

    def _look_for_dead(self) -> Failure | None:
        for rank, member in enumerate(self.members):
            # The process first: a goodbye said in between must count.
            if process_start_time(member.pid) != member.started and member.board.words[_STATE] == _RUNNING:
                speaker = next((i for i in range(len(self.members)) if self._running(i)), self.rank)
                pid = member.pid
                message = f"rank {rank} (pid {pid}) died without a word (killed, perhaps out of memory)"
                self._enter(rank, _DIED, speaker, message)
                return self.failure()
        return None

    def _stopped(self, failure: Failure) -> StoppedWithOthers:
        patience = time.monotonic() + _SPEAKER_S
        while not self._told(failure, time.monotonic() > patience):
            time.sleep(0.05)  # the speaker's launcher may end it as soon as another rank has gone
        return StoppedWithOthers(f"rank {failure.rank} failed: {failure.message}")

    def _told(self, failure: Failure, take_over: bool) -> bool:
        """Tell of a silent death when it is this rank's turn; whether it has been told."""
        words = self._record.words
        if failure.kind == _TOLD or words[_SPOKEN]:
            return True
        if failure.speaker != self.rank and not take_over and self._running(failure.speaker):
            return False
        with self._exclusive():
            mine = not words[_SPOKEN]
            words[_SPOKEN] = 1
        if mine:
            print(f"\noarlock: error: {failure.message}; all ranks stop", file=sys.stderr, flush=True)
        return True

    def _watch(self) -> None:
        """In a thread: end this process when the run has failed and the main thread does not notice."""
        noticed = 0.0
        while not self._over.wait(_WATCH_S):
            failure = self.failure() or self._look_for_dead()
            if not failure:
                continue
            noticed = noticed or time.monotonic()
            waited = time.monotonic() - noticed
            self._told(failure, waited > _SPEAKER_S)
            if waited > _GRACE_S:
                # In a thread of its own: the main thread may hold a stream's lock forever.
                flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
                flush.start()
                flush.join(1.0)
                os._exit(1)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Python's way out for an error nobody caught: tell the others, or keep silent when one of them was first."""
        if os.getpid() != self.pid:
            return self._previous_hook(kind, error, trace)
        if isinstance(error, StoppedWithOthers):
            return None
        self.announce(f"{kind.__name__}: {error}")
        failure = self.failure()
        if failure and failure.rank != self.rank:
            self._stopped(failure)
        elif self._own_error:
            report(self._own_error)  # Paddle wraps what is raised inside a backward pass in an error of its own
        else:
            self._previous_hook(kind, error, trace)
        return None
