"""Asking the kernel for memory in one go: a page at a time, as it is first written, takes longer than the writing."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; older kernels refuse it, and pages come one by one as ever
_PAGE = os.sysconf("SC_PAGE_SIZE")
_FEW = 1 << 18  # bytes


def populate(memory: np.ndarray) -> None:
    """All pages of a contiguous array that is about to be written over; those that are there stay as they are."""
    size = memory.nbytes
    madvise = _madvise() if size >= _FEW else None
    if madvise is None:
        return
    start = memory.ctypes.data
    end = start + size
    start = -(-start // _PAGE) * _PAGE  # whole pages: those at the ends may be a neighbour's
    madvise(start, max(0, end // _PAGE * _PAGE - start), _POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
