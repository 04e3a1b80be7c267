"""The memory that is available to this process, and errors for what does not fit.

Paddle is imported for GPU memory only.
"""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from oarlock.errors import ModelError, OarlockError

_UNLIMITED = 1 << 60  # bytes; cgroups version 1 write a number above this for "no limit"


@dataclass(frozen=True)
class AvailableMemory:
    """Memory that can still be allocated.

    Attributes:
        where: whose memory, as in "3.2 GB are left ...".
    """

    num_bytes: int
    where: str


def measure_available_memory(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> AvailableMemory | None:
    """The memory that this process can still allocate: the least of the machine's, its container's and its own limits.

    File caches and swap count as available. None if the system does not report it.
    """
    found: list[AvailableMemory] = []
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines if len(words) > 1}
        if "MemAvailable:" in sizes:
            left = sizes["MemAvailable:"] + sizes.get("SwapFree:", 0)
            found.append(AvailableMemory(left, "free on this machine"))
    own_groups = ""
    with contextlib.suppress(OSError):
        own_groups = (proc / "self/cgroup").read_text()
    for line in own_groups.splitlines():  # a process has one group of version 2, and several of version 1
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            found += _of_group(cgroups, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            found += _of_group(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = [int(word) for word in (proc / "self/statm").read_text().split()]
        for limit, taken, flag in ((resource.RLIMIT_AS, pages[0], "-v"), (resource.RLIMIT_DATA, pages[5], "-d")):
            most, _ = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                left = most - taken * resource.getpagesize()
                found.append(AvailableMemory(left, f"left of this process's limit (ulimit {flag})"))
    return min(found, key=lambda memory: memory.num_bytes, default=None)


@contextlib.contextmanager
def freeze_garbage_collection() -> Iterator[None]:
    """Within this block, Python's garbage collector ignores the objects that exist now.

    These are half a million objects of imported modules and of the model. Looking through them again and again takes 1%
    of the steps of a small model.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def measure_available_gpu_memory(device: str) -> AvailableMemory:
    """The memory that Paddle can still allocate on a GPU ("gpu:0"). Other programs on the GPU are not counted."""
    import paddle

    total = int(paddle.device.cuda.get_device_properties(device).total_memory)
    return AvailableMemory(total - int(paddle.device.cuda.memory_allocated(device)), f"free on {device}")


def check_memory(needed: int, what: str, room: AvailableMemory | None, error: type[OarlockError] = ModelError) -> None:
    """Refuse what needs more memory than there is.

    Args:
        needed: at least so many bytes.
        what: the subject of the error message.

    Raises:
        OarlockError: of class `error`, with both sizes.
    """
    if room is not None and needed > room.num_bytes:
        raise error(
            f"{what} needs {format_bytes(needed)} of memory, and {format_bytes(max(0, room.num_bytes))} are "
            f"{room.where}"
        )


def format_bytes(num_bytes: int) -> str:
    """A number of bytes as text, such as "3.2 GB"."""
    for unit, size in (("TB", 10**12), ("GB", 10**9)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e6:,.1f} MB"


def _of_group(root: Path, path: str, limit: str, used: str, prefix: str) -> Iterator[AvailableMemory]:
    """The limits of a cgroup and of all groups above it."""
    inside = root / path.lstrip("/")
    # In a container the path is that of the host, but the mounted folder is the group itself.
    folders = [inside, *inside.parents] if inside.is_dir() and ".." not in inside.parts else [root]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, IndexError):
            most = int((folder / limit).read_text())
            if most < _UNLIMITED:
                lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                stat = {words[0]: int(words[1]) for words in lines}
                cached = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
                left = most - max(0, int((folder / used).read_text()) - cached)
                yield AvailableMemory(left, "left of what this container may use (its cgroup's memory limit)")
        if folder == root:
            return
