"""How much memory there is for this process, and errors with numbers for what does not fit into it.

Imports paddle only where a GPU is asked for.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oarlock.errors import ModelError, OarlockError

_UNLIMITED = 1 << 60  # bytes; what version 1 of cgroups writes for "no limit" is above it


@dataclass(frozen=True)
class Room:
    """Memory that can still be taken.

    Attributes:
        num_bytes: of it.
        where: as the end of "there are 3.2 GB ...".
    """

    num_bytes: int
    where: str


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Room | None:
    """What this process may still take of the machine, its container and its own limits: the least of them.

    Memory that the kernel would give back (caches of files) counts as free, and so does swap. None where the system
    does not say.
    """
    rooms = [*_of_machine(proc), *_of_cgroups(proc, cgroups), *_of_limits(proc)]
    return min(rooms, key=lambda room: room.num_bytes, default=None)


def free_gpu_memory(device: str) -> Room:
    """What Paddle may still take of a GPU ("gpu:0"); other programs on it are not seen."""
    import paddle

    total = int(paddle.device.cuda.get_device_properties(device).total_memory)
    return Room(total - int(paddle.device.cuda.memory_allocated(device)), f"free on {device}")


def check_fits(needed: int, what: str, room: Room | None, error: type[OarlockError] = ModelError) -> None:
    """Refuse what needs more memory than there is.

    Args:
        needed: bytes, at least.
        what: the beginning of the sentence, up to "needs".

    Raises:
        OarlockError: of the class given, with both sizes.
    """
    if room is not None and needed > room.num_bytes:
        raise error(
            f"{what} needs {in_words(needed)} of memory, and {in_words(max(0, room.num_bytes))} are {room.where}"
        )


def in_words(num_bytes: int) -> str:
    """Bytes as people read them: "3.2 GB", "640.0 MB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e6:,.1f} MB"


def _of_machine(proc: Path) -> Iterator[Room]:
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        found = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
        if "MemAvailable:" in found:
            yield Room(found["MemAvailable:"] + found.get("SwapFree:", 0), "free on this machine")


def _of_cgroups(proc: Path, root: Path) -> Iterator[Room]:
    """Of the group this process is in and of every group above it; version 2, then version 1."""
    own = ""
    with contextlib.suppress(OSError):
        own = (proc / "self/cgroup").read_text()
    for line in own.splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            yield from _of_group(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _of_group(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _of_group(root: Path, path: str, limit: str, used: str, prefix: str) -> Iterator[Room]:
    inside = root / path.lstrip("/")
    # In a container the path is the host's, and what is mounted here is the group itself.
    folders = [inside, *inside.parents] if inside.is_dir() and ".." not in inside.parts else [root]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, IndexError):
            most = int((folder / limit).read_text())
            if most < _UNLIMITED:
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                stat = {words[0]: int(words[1]) for words in lines}
                cached = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
                left = most - max(0, int((folder / used).read_text()) - cached)
                yield Room(left, "left of what this container may use (its cgroup's memory limit)")
        if folder == root:
            return


def _of_limits(proc: Path) -> Iterator[Room]:
    """RLIMIT_AS and RLIMIT_DATA (ulimit -v, -d)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = [int(word) for word in (proc / "self/statm").read_text().split()]
        for which, taken, flag in ((resource.RLIMIT_AS, pages[0], "-v"), (resource.RLIMIT_DATA, pages[5], "-d")):
            most, _ = resource.getrlimit(which)
            if most != resource.RLIM_INFINITY:
                yield Room(most - taken * resource.getpagesize(), f"left of this process's limit (ulimit {flag})")
