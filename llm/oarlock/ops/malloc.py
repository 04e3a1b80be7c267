"""How the C library gives memory to tensors on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_ALL = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next tensor, in the place of giving it back to the system.

    By default glibc maps each large block afresh and unmaps it when it is freed, as Paddle does with every tensor of a
    step: all of its pages are then zeroed and faulted in again, which takes ten times as long as computing an RMSNorm
    in them. For the run of a training loop: what was needed at the peak stays with the process.

    Returns:
        Whether this C library can (glibc).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The largest block that older glibc's allow here is 32 MB; newer ones take any.
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _ALL))
