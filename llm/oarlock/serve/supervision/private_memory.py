"""Keeps Triton's shared memory readable by its user only.

Triton's Python backend makes its regions with Boost, which opens /dev/shm/NAME by the umask (0600 here) and then sets
mode 0644 by fchmod(), whatever the umask. A kernel filter (seccomp) refuses that one call in Triton and its models, and
Boost continues. Without such a filter, the modes are changed when Triton has started.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from collections.abc import Callable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_OPENED_TO_ALL = 0o644
# AUDIT_ARCH_... and the number of fchmod, of <linux/audit.h> and <asm/unistd.h>.
_CALLS = {"x86_64": (0xC000003E, 91), "aarch64": (0xC00000B7, 52)}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: ld [k], jeq #k, ret #k
_ERROR, _ALLOW = 0x00050000, 0x7FFF0000
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24  # offsets in struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def make_memory_filter() -> Callable[[], None]:
    """Make a function that a child calls before it becomes Triton: from then on fchmod(file, 0644) fails.

    Errors are ignored. Everything is prepared here: a child of a process with threads may do next to nothing.
    """
    known = _CALLS.get(platform.machine())
    if sys.platform != "linux" or known is None:
        return lambda: None
    architecture, number = known
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 0, 5, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, _SECOND_ARGUMENT),
        (_JUMP_IF_EQUAL, 0, 1, _OPENED_TO_ALL),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *one) for one in instructions)
    program = _Program(len(instructions), code)
    pointer, prctl = ctypes.byref(program), ctypes.CDLL(None).prctl

    def install() -> None:
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        prctl(_PR_SET_SECCOMP, _FILTER, pointer, 0, 0)

    return install


def close_memory(prefix: str) -> None:
    """Remove the rights of other users from regions."""
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        try:
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
        except FileNotFoundError:
            continue
