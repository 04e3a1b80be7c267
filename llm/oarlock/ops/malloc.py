"""Tuning of malloc for tensors on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory for the next tensor, instead of returning it to the system.

    By default glibc maps each large block and unmaps it when it is freed. Paddle does that with every tensor of a step,
    and all pages are zeroed and faulted in again. That takes ten times as long as computing an RMSNorm in them.
    Afterwards the process keeps the memory of its peak.

    Returns:
        Whether this C library supports it (glibc does).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions of glibc allow at most 32 MB here.
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _ALL))
