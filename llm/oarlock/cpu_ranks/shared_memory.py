"""Memory that the ranks of one machine share, and 32-bit words in it on which they can wait (Linux).

Each rank owns one anonymous memory file (memfd) and passes its descriptor to the others. So nothing is left behind when
a rank ends, even by SIGKILL, and the size of /dev/shm does not matter. All memory files have the same size, which is
sealed, so nobody can truncate what another has mapped. Pages take no memory until they are written.
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
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1  # not "private", because the waiters are other processes
_PROT_READ_WRITE, _MAP_SHARED = 3, 1
_KEEP_SIZE_AND_PUNCH_HOLE = 1 | 2
_EVERYBODY = 0x7FFFFFFF
_MAX_TRANSFER = 1 << 30  # bytes per read or write call; Linux allows up to 2 GiB
_MEMORY_BYTES = 1 << 40  # of each memory file; more than any machine has, because only written pages take memory
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_futex: Any = _libc.syscall
_futex_number = _FUTEX_NUMBERS.get(platform.machine(), 0)
# Not on x86, where stores become visible in program order and loads are not reordered with loads.
_needs_fence = platform.machine() not in ("x86_64", "AMD64")


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def round_up(number: int, step: int = PAGE) -> int:
    """Round up to a multiple of step."""
    return -(-number // step) * step


def fence() -> None:
    """Memory barrier between the loads and stores before and after this call."""
    if _needs_fence:  # FUTEX_WAKE passes a full barrier in the kernel before it looks for waiters
        _futex(_futex_number, ctypes.c_void_p(_fence_address), _FUTEX_WAKE, 1, None, None, 0)


_fence_word = ctypes.c_uint32()
_fence_address = ctypes.addressof(_fence_word)


class MappedArea:
    """A part of a memory file, mapped until the end of this process.

    Attributes:
        bytes: the memory as uint8.
        words: the memory as 32-bit words. Only one process writes a word; all may wait on it.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        whole: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        self.bytes: np.ndarray = np.frombuffer(whole, dtype=np.uint8)
        self.words = memoryview(whole).cast("B").cast("I")
        self._address = address

    def publish(self, index: int, value: int) -> None:
        """Set a word, after all earlier writes, and wake the processes that wait on it."""
        fence()
        self.words[index] = value & WORD_MASK
        _futex(_futex_number, ctypes.c_void_p(self._address + 4 * index), _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def sleep_while(self, index: int, value: int, seconds: float) -> None:
        """Sleep until another value is published, or for `seconds`. May return early."""
        limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
        address = ctypes.c_void_p(self._address + 4 * index)
        _futex(_futex_number, address, _FUTEX_WAIT, ctypes.c_uint32(value), ctypes.byref(limit), None, 0)


def memory_bytes() -> int:
    """The size of every rank's memory file, limited by `ulimit -f`."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return _MEMORY_BYTES if limit == resource.RLIM_INFINITY else min(_MEMORY_BYTES, limit // PAGE * PAGE)


class MemoryFile:
    """The memory file of a rank. Only its owner reserves memory in it; all ranks map, read and write."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._reserved = descriptor, 0
        self.nbytes = os.fstat(descriptor).st_size

    @classmethod
    def create(cls) -> MemoryFile:
        """Create the memory file of this process.

        Raises:
            EnvironmentProblem: the system has no memory files or futexes.
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
    def received(cls, descriptor: int) -> MemoryFile:
        """The memory file of another rank, from a received descriptor. Closes the descriptor on errors.

        Raises:
            EnvironmentProblem: it is not a sealed memory file of this user with the expected size.
        """
        problem = _find_memory_problem(descriptor)
        if problem:
            os.close(descriptor)
            raise EnvironmentProblem(f"the descriptor of a rank's memory {problem}")
        return cls(descriptor)

    def reserve(self, nbytes: int) -> int:
        """Reserve nbytes, zeroed and not yet backed by memory; returns the offset, a multiple of the page size."""
        offset, end = self._reserved, self._reserved + round_up(nbytes)
        if end > self.nbytes:
            raise EnvironmentProblem(f"can't reserve {nbytes:,} more bytes of memory shared by ranks (`ulimit -f`)")
        self._reserved = end
        return offset

    def map(self, offset: int, nbytes: int) -> MappedArea:
        """Map a part of the file into this process."""
        self._check(offset, nbytes)
        # Not mmap.mmap, which keeps a file descriptor per mapping.
        address = _libc.mmap(None, nbytes, _PROT_READ_WRITE, _MAP_SHARED, self.descriptor, offset)
        if address in (None, ctypes.c_void_p(-1).value):
            reason = os.strerror(ctypes.get_errno())
            raise EnvironmentProblem(f"{nbytes:,} bytes of memory shared by ranks can't be mapped: {reason}")
        return MappedArea(address, nbytes)

    def write(self, offset: int, data: Any) -> None:
        """Write data (bytes) at an offset, a multiple of the page size."""
        self._transfer(os.pwrite, offset, data)

    def read(self, offset: int, data: Any) -> None:
        """Read into data (bytes) from an offset, a multiple of the page size."""
        self._transfer(lambda descriptor, part, at: os.preadv(descriptor, [part], at), offset, data)

    def release(self, offset: int, nbytes: int) -> None:
        """Release pages to the system. The range stays reserved and reads as zeros."""
        _libc.fallocate(self.descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(nbytes))

    def _check(self, offset: int, nbytes: int) -> None:
        if offset % PAGE or nbytes < 0 or not 0 <= offset <= self.nbytes - nbytes:
            raise EnvironmentProblem(f"{nbytes:,} bytes at {offset:,} are outside the memory that ranks share")

    def _transfer(self, call: Callable[[int, memoryview, int], int], offset: int, data: Any) -> None:
        rest = memoryview(data)
        self._check(offset, len(rest))
        while rest:
            done = self._checked(call, self.descriptor, rest[:_MAX_TRANSFER], offset)
            if not done:
                raise EnvironmentProblem("memory shared by ranks is shorter than expected")
            rest, offset = rest[done:], offset + done

    @staticmethod
    def _checked(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            raise EnvironmentProblem(f"no memory left for sharing between ranks: {error.strerror}") from error


def _find_memory_problem(descriptor: int) -> str | None:
    found = os.fstat(descriptor)
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)  # fails for other files
    except OSError:
        return "is not a memory file"
    if not stat.S_ISREG(found.st_mode) or seals != _SEALS:
        return "is not a memory file whose size is sealed"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}"
    if found.st_size != memory_bytes():
        return f"has {found.st_size:,} bytes instead of {memory_bytes():,} (`ulimit -f` must be the same for all ranks)"
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "can't be written"
    return None
