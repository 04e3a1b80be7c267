"""Copying matrices between NumPy arrays of any two float types, transposed or not (custom_ops/copy_matrix)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from oarlock.ops.library import LIBRARY, why_missing

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}  # DType in dtypes.h
_MIN_SIZE = 4096  # elements; NumPy is as fast for fewer


def copy_matrix(to: np.ndarray, values: np.ndarray) -> bool:
    """Copy in this thread without the GIL. Returns False, without copying, if the library can't or need not do it.

    A transposed matrix is copied in blocks that fit the registers.

    Args:
        to, values: [rows, columns], or any number of axes if both are contiguous.
    """
    if values.size < _MIN_SIZE or to.dtype not in _TYPES or values.dtype not in _TYPES or to.shape != values.shape:
        return False
    if to.flags.c_contiguous and values.flags.c_contiguous:
        to, values = to.reshape(1, -1), values.reshape(1, -1)
    if to.ndim != 2:
        return False
    transposed = values.strides[0] == values.itemsize and values.strides[1] != values.itemsize
    stride = _stride(values.T if transposed else values)
    to_stride = _stride(to)
    copy = _function()
    if copy is None or stride is None or to_stride is None:
        return False
    places = values.ctypes.data, stride, _TYPES[values.dtype], transposed, to.ctypes.data, to_stride, _TYPES[to.dtype]
    copy(*to.shape, *places)
    return True


def _stride(array: np.ndarray) -> int | None:
    """Return the number of elements from one row to the next, or None if a row is not contiguous."""
    rows, columns = array.strides
    if columns != array.itemsize or rows < 0 or rows % array.itemsize:
        return None
    return rows // array.itemsize


@functools.cache
def _function() -> Callable[..., None] | None:
    if why_missing():
        return None
    import paddle  # noqa: F401  the library needs Paddle in the process

    function = ctypes.CDLL(str(LIBRARY)).oarlock_copy_matrix
    size, place, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [size, size, place, size, kind, kind, place, size, kind]
    function.restype = None
    return function
