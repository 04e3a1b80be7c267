"""Describes the reader or port that a harness feeds, and judges one input.

An input ends in a result or in an OarlockError, within two seconds and 300 MB, and leaves no file outside the folder it
was given, no process and no connection. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarlock.errors import OarlockError

SECONDS = 2.0  # CPU time of this thread, so that a busy machine is not a finding
MEGABYTES = 300
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.symlink",
    "os.link",
    "os.rename",
}
_RELATIVE = {"os.mkdir", "os.remove", "os.rmdir"}
_PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
}
_CONNECTIONS = {"socket.connect", "socket.bind", "socket.sendto"}
_CODE = {"pickle.find_class", "marshal.loads", "ctypes.dlopen"}


@dataclass(frozen=True)
class Harness:
    """A reader or port and its inputs.

    Attributes:
        target: called with the bytes and a folder, which is empty at first and its own for the whole run.
        seeds: real inputs, made by code.
        tokens: pieces that have a meaning in this format ("*a", "\\ud800"); they are put into inputs.
        around: a context for the run, for instance a server; if its value is not None, it is the third argument of
            `target`.
        refusals: acceptable exceptions other than OarlockError (such as those of a refused client).
        connects: whether the target connects to a server, so that connections are not a finding.
        seconds: CPU seconds of one input.
    """

    target: Callable[..., object]
    seeds: Callable[[], Sequence[bytes]]
    tokens: Sequence[bytes] = ()
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    refusals: tuple[type[BaseException], ...] = ()
    connects: bool = False
    seconds: float = SECONDS


@dataclass
class Finding:
    """A forbidden effect of an input."""

    what: str
    data: bytes
    trace: str = ""

    @property
    def key(self) -> str:
        """A key that inputs with the same source location of the fault share."""
        return (
            self.what.split(":")[0]
            + "".join(line for line in self.trace.splitlines() if line.startswith("  File"))[-300:]
        )


@dataclass
class Judge:
    """Runs a harness on one input after another and keeps one finding per source location."""

    harness: Harness
    folder: Path
    server: Any = None
    findings: dict[str, Finding] = field(default_factory=dict)
    executions: int = 0
    refused: int = 0

    def __call__(self, data: bytes) -> Finding | None:
        """Run one input."""
        self.executions += 1
        arguments = (data, self.folder) if self.server is None else (data, self.folder, self.server)
        _watch.start(self.folder, self.harness.connects)
        memory, start = _peak(), time.thread_time()
        found: Finding | None = None
        try:
            self.harness.target(*arguments)
        except (OarlockError, *self.harness.refusals):
            self.refused += 1
        except Exception as error:
            found = Finding(f"{type(error).__name__}: {error}", data, traceback.format_exc())
        seconds, more, seen = time.thread_time() - start, _peak() - memory, _watch.stop()
        if found is None and seen:
            found = Finding(seen[0], data)
        if found is None and seconds > self.harness.seconds:
            found = Finding(f"slow: {seconds:.1f} s", data)
        if found is None and more > MEGABYTES:
            found = Finding(f"large: {more:.0f} MB", data)
        if found is not None:
            self.findings.setdefault(found.key, found)
        return found

    def seeds(self) -> list[bytes]:
        """Run each seed once, so that imports on first use are not attributed to an input; return the seeds."""
        seeds = list(self.harness.seeds())
        for seed in seeds:
            with contextlib.suppress(Exception):
                self.harness.target(*((seed, self.folder) if self.server is None else (seed, self.folder, self.server)))
        for seed in seeds:
            self(seed)
        return seeds


@contextlib.contextmanager
def open_judge(harness: Harness) -> Iterator[Judge]:
    """A judge with its own folder and the environment of the harness; looks for leftover processes at the end."""
    before = _children()
    _watch.others = {thread.ident or 0 for thread in threading.enumerate()} - {threading.get_ident()}
    with tempfile.TemporaryDirectory(prefix="oarlock-fuzz-") as folder:
        with harness.around() as server:
            judge = Judge(harness, Path(folder).resolve(), server)
            yield judge
        for left in _children() - before:
            judge.findings[f"process {left}"] = Finding(f"a process is left: {left}", b"")


def keep(findings: Sequence[Finding], folder: Path) -> list[str]:
    """Write the inputs of findings into a folder, and return a sentence about each."""
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for finding in findings:
        path = folder / hashlib.sha256(finding.data).hexdigest()[:16]
        path.write_bytes(finding.data)
        said.append(f"{finding.what}\n  input: {path}\n{finding.trace}")
    return said


class _Watch:
    """Records Python's audit events of the running input."""

    def __init__(self) -> None:
        self._on, self._folder, self._connects = False, "", False
        self._seen: list[str] = []
        self._hooked = False
        self.others: set[int] = set()  # unrelated threads that existed before

    def start(self, folder: Path, connects: bool) -> None:
        if not self._hooked:
            # Audit hooks can't be removed, so it is added once and switched off between inputs.
            sys.addaudithook(self._event)
            self._hooked = True
        self._folder, self._connects, self._seen, self._on = str(folder), connects, [], True

    def stop(self) -> list[str]:
        self._on = False
        return self._seen

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on or threading.get_ident() in self.others:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self._path(event, path)
        elif event in _CHANGES:
            # A descriptor of the folder that the path is relative to.
            folder = arguments[-1] if event in _RELATIVE else -1
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)):
                    self._path(event, path, folder)
        elif event in _CODE:
            if not _importing():
                self._seen.append(f"{event} {arguments!r:.200}")
        elif event in _PROCESSES or (event in _CONNECTIONS and not self._connects):
            self._seen.append(f"{event} {arguments!r:.200}")

    def _path(self, event: str, path: str | bytes, folder: int = -1) -> None:
        base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
        absolute = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        if not absolute.startswith(f"{self._folder}/") and absolute != "/dev/null" and "__pycache__" not in absolute:
            self._seen.append(f"{event} outside of its folder: {absolute}")


_watch = _Watch()


def _importing() -> bool:
    """Whether an import statement is running, which reads code of installed packages."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update((task / "children").read_text().split())
    return found
