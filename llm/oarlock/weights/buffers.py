"""Memory for tensors: copies between arrays of any two float types, and pages requested from the kernel."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from oarlock.ops.copy_matrix import copy_matrix

_CHECKED = 1 << 18  # elements checked at a time
_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}  # all of these bits are set in no number
_TILE = (192, 256)  # rows and columns that fit into a core's cache when NumPy transposes a matrix
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE (Linux 5.14); older kernels reject it and fault pages in one by one
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MIN_BYTES = 1 << 18


def array_type(dtype: str) -> np.dtype:
    """The NumPy type for Paddle's name of a type."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def row_ranges(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) along the first axis, each of at most max_bytes or of one row."""
    num_rows = shape[0] if shape else 1
    step = max(1, max_bytes // max(1, math.prod(shape[1:]) * itemsize))
    for begin in range(0, num_rows, step):
        yield begin, min(begin + step, num_rows)


def copy_array(to: np.ndarray, values: np.ndarray) -> None:
    """Copy between any two float types. Transposed matrices are copied in tiles, which is several times faster."""
    if copy_matrix(to, values):
        return
    if values.ndim != 2 or abs(values.strides[0]) >= abs(values.strides[1]):
        np.copyto(to, values, casting="unsafe")
        return
    for row in range(0, to.shape[0], _TILE[0]):
        for column in range(0, to.shape[1], _TILE[1]):
            tile = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
            # Converting and transposing at once is slower than one after the other.
            part = values[tile]
            to[tile] = part if to.dtype == values.dtype else part.T.astype(to.dtype).T


def all_finite(values: np.ndarray) -> bool:
    """Check that floats of any type are neither NaN nor infinite. Other types always pass.

    The values are read once, in chunks that fit into a core's cache. That takes a tenth of the time of a copy.
    """
    flat = values.reshape(-1) if values.flags.c_contiguous else np.ravel(values, order="K")
    parts = (flat[begin : begin + _CHECKED] for begin in range(0, flat.size, _CHECKED))
    if values.dtype == np.float32:  # its square overflows long before it does
        return all(np.isfinite(np.dot(part, part)) or bool(np.isfinite(part).all()) for part in parts)
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return values.dtype.kind not in "fV" or bool(np.isfinite(values).all())
    return all(int((part.view(np.uint16) & mask).max()) != mask for part in parts)


def populate(memory: np.ndarray) -> None:
    """Request all pages of a contiguous array that is about to be overwritten. Present pages keep their values.

    Page faults on the first write to each page would take longer than the writes.
    """
    size = memory.nbytes
    madvise = _madvise() if size >= _MIN_BYTES else None
    if madvise is None:
        return
    start = memory.ctypes.data
    end = start + size
    start = -(-start // _PAGE) * _PAGE  # only full pages: those at the ends may be shared with a neighbour
    madvise(start, max(0, end // _PAGE * _PAGE - start), _POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
