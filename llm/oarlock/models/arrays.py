"""Copying between NumPy arrays of any two float types, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from oarlock.ops.matrices import copy_matrix

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
