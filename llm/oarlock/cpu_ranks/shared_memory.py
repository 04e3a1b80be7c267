"""Memory that the ranks of one machine share, and 32-bit words in it that they wait on (Linux).

Each rank owns one memory file (memfd) without a name and hands the others its descriptor. So nothing is left behind
when a rank ends, SIGKILL included, and /dev/shm's size is no limit. All memories have one size, which is sealed: nobody
can cut what another has mapped. Pages cost nothing until they are written.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import stat
from collections.abc import Callable
from typing import Any

import numpy as np

from oarlock.errors import EnvironmentProblem

PAGE = os.sysconf("SC_PAGE_SIZE")  # 4 kB, on some aarch64 systems 16 or 64
WORD_MASK = 0xFFFFFFFF
_FUTEX_NUMBERS = {"x86_64": 202, "AMD64": 202, "aarch64": 98, "arm64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # not "private": the waiters are other processes
_PROT_READ_WRITE, _MAP_SHARED = 3, 1
_KEEP_SIZE_AND_PUNCH_HOLE = 1 | 2
_EVERYBODY = 0x7FFFFFFF
_MAX_TRANSFER = 1 << 30  # bytes a read or write call; Linux stops at 2 GiB
_MEMORY_BYTES = 1 << 40  # of each memory file: more than any machine has, as only what is written takes memory
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_futex: Any = _libc.syscall
_futex_number = _FUTEX_NUMBERS.get(platform.machine(), 0)
# On x86 stores become visible in program order and loads are not reordered with loads, so that publishing needs none.
_needs_fence = platform.machine() not in ("x86_64", "AMD64")


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def round_up(number: int, step: int = PAGE) -> int:
    """The next multiple of step."""
    return -(-number // step) * step


def fence() -> None:
    """Order the stores and loads before against those after, where the processor does not do so by itself."""
    if _needs_fence:  # the kernel's FUTEX_WAKE passes a full barrier before it looks for waiters
        _futex(_futex_number, ctypes.c_void_p(_fence_address), _FUTEX_WAKE, 1, None, None, 0)


_fence_word = ctypes.c_uint32()
_fence_address = ctypes.addressof(_fence_word)


class Area:
    """A part of a memory file, mapped for the life of this process.

    Attributes:
        bytes: all of it, uint8.
        words: the same as 32-bit words. Each word has one process that writes it; everybody may wait on it.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        whole: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        self.bytes: np.ndarray = np.frombuffer(whole, dtype=np.uint8)
        self.words = memoryview(whole).cast("B").cast("I")
        self._address = address

    def publish(self, index: int, value: int) -> None:
        """Set a word after everything written so far, and wake those who wait on it."""
        fence()
        self.words[index] = value & WORD_MASK
        _futex(_futex_number, ctypes.c_void_p(self._address + 4 * index), _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def sleep_while(self, index: int, value: int, seconds: float) -> None:
        """Sleep until somebody publishes another value there; may return early (signals) and after `seconds`."""
        limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
        address = ctypes.c_void_p(self._address + 4 * index)
        _futex(_futex_number, address, _FUTEX_WAIT, ctypes.c_uint32(value), ctypes.byref(limit), None, 0)


def memory_bytes() -> int:
    """The size of every rank's memory file: what fits below `ulimit -f`, where there is one."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return _MEMORY_BYTES if limit == resource.RLIM_INFINITY else min(_MEMORY_BYTES, limit // PAGE * PAGE)


class Memory:
    """One rank's memory file. Only its owner reserves room; everybody maps, reads and writes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._reserved = descriptor, 0
        self.nbytes = os.fstat(descriptor).st_size

    @classmethod
    def create(cls) -> Memory:
        """This process's own, with no room reserved.

        Raises:
            EnvironmentProblem: where the system offers no memory files or futexes.
        """
        if not _futex_number or not hasattr(os, "memfd_create"):
            raise EnvironmentProblem(
                f"CPU groups need Linux on x86_64 or aarch64, not {platform.system()} on {platform.machine()}"
            )
        try:
            descriptor = os.memfd_create("oarlock-ranks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, memory_bytes())
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise EnvironmentProblem(f"CPU groups need memory files (memfd_create): {error.strerror}") from error
        return cls(descriptor)

    @classmethod
    def received(cls, descriptor: int) -> Memory:
        """Another rank's, by the descriptor that it has handed over; closed when it is not one.

        Raises:
            EnvironmentProblem: it is no memory file of this user, of another size, or not sealed.
        """
        problem = _why_no_memory(descriptor)
        if problem:
            os.close(descriptor)
            raise EnvironmentProblem(f"what was handed over as a rank's memory {problem}")
        return cls(descriptor)

    def reserve(self, nbytes: int) -> int:
        """Room for nbytes, zeroed and not yet backed by memory; returns its offset (a multiple of the page size)."""
        offset, end = self._reserved, self._reserved + round_up(nbytes)
        if end > self.nbytes:
            raise EnvironmentProblem(f"no room for {nbytes:,} bytes more of memory shared by ranks (`ulimit -f`)")
        self._reserved = end
        return offset

    def map(self, offset: int, nbytes: int) -> Area:
        """A part of it as memory of this process."""
        self._check(offset, nbytes)
        # Not mmap.mmap: it would hold a file descriptor for each part.
        address = _libc.mmap(None, nbytes, _PROT_READ_WRITE, _MAP_SHARED, self.descriptor, offset)
        if address in (None, ctypes.c_void_p(-1).value):
            reason = os.strerror(ctypes.get_errno())
            raise EnvironmentProblem(f"{nbytes:,} bytes of memory shared by ranks can't be mapped: {reason}")
        return Area(address, nbytes)

    def write(self, offset: int, data: Any) -> None:
        """Copy data (bytes) to an offset, a multiple of the page size."""
        self._transfer(os.pwrite, offset, data)

    def read(self, offset: int, data: Any) -> None:
        """Fill data (bytes) from an offset, a multiple of the page size."""
        self._transfer(lambda descriptor, part, at: os.preadv(descriptor, [part], at), offset, data)

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages back to the system; the room stays reserved and reads as zeros."""
        _libc.fallocate(self.descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(nbytes))

    def _check(self, offset: int, nbytes: int) -> None:
        if offset % PAGE or nbytes < 0 or not 0 <= offset <= self.nbytes - nbytes:
            raise EnvironmentProblem(f"{nbytes:,} bytes at {offset:,} are not part of the memory that ranks share")

    def _transfer(self, call: Callable[[int, memoryview, int], int], offset: int, data: Any) -> None:
        rest = memoryview(data)
        self._check(offset, len(rest))
        while rest:
            done = self._checked(call, self.descriptor, rest[:_MAX_TRANSFER], offset)
            if not done:
                raise EnvironmentProblem("memory shared by ranks ends too early")
            rest, offset = rest[done:], offset + done

    @staticmethod
    def _checked(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            raise EnvironmentProblem(f"no room for memory shared by ranks: {error.strerror}") from error


def _why_no_memory(descriptor: int) -> str | None:
    found = os.fstat(descriptor)
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)  # of memory files alone
    except OSError:
        return "is not a memory file"
    if not stat.S_ISREG(found.st_mode) or seals != _SEALS:
        return "is not a memory file whose size is sealed"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_size != memory_bytes():
        return f"has {found.st_size:,} bytes and not {memory_bytes():,} (`ulimit -f` must be the same for all ranks)"
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "can't be written"
    return None
