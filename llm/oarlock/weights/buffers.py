"""Copying between NumPy arrays of any two float types, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from oarlock.ops.copy_matrix import copy_matrix

_CHECKED = 1 << 18  # elements looked at at a time
_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}  # all of whose bits no number has
_TILE = (192, 256)  # rows and columns that fit in a core's cache when NumPy transposes a matrix


def array_type(dtype: str) -> np.dtype:
    """NumPy's type for Paddle's name of one."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def row_ranges(shape: tuple[int, ...], itemsize: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """(begin, end) along the first axis, of at most max_bytes (or one row) each."""
    num_rows = shape[0] if shape else 1
    step = max(1, max_bytes // max(1, math.prod(shape[1:]) * itemsize))
    for begin in range(0, num_rows, step):
        yield begin, min(begin + step, num_rows)


def copy_array(to: np.ndarray, values: np.ndarray) -> None:
    """Copy between any two float types; a transposed matrix tile by tile, which is several times faster."""
    if copy_matrix(to, values):
        return
    if values.ndim != 2 or abs(values.strides[0]) >= abs(values.strides[1]):
        np.copyto(to, values, casting="unsafe")
        return
    for row in range(0, to.shape[0], _TILE[0]):
        for column in range(0, to.shape[1], _TILE[1]):
            tile = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
            # Converting and turning at once is slower than one after the other.
            part = values[tile]
            to[tile] = part if to.dtype == values.dtype else part.T.astype(to.dtype).T


def all_finite(values: np.ndarray) -> bool:
    """Whether floats of any type are all numbers (neither NaN nor infinite); true for other types.

    Read once, a part that fits into a core's cache at a time: a tenth of the time that copying takes.
    """
    flat = values.reshape(-1) if values.flags.c_contiguous else np.ravel(values, order="K")
    parts = (flat[begin : begin + _CHECKED] for begin in range(0, flat.size, _CHECKED))
    if values.dtype == np.float32:  # its square overflows long before it does
        return all(np.isfinite(np.dot(part, part)) or bool(np.isfinite(part).all()) for part in parts)
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None:
        return values.dtype.kind not in "fV" or bool(np.isfinite(values).all())
    return all(int((part.view(np.uint16) & mask).max()) != mask for part in parts)
