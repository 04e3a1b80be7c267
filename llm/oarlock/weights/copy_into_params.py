"""Copies slices of whole tensors into parameters, a few rows at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle

from oarlock.cpu_ranks.tensor_view import TensorView
from oarlock.weights.buffers import array_type, copy_array, populate
from oarlock.weights.layout import TensorSlice


def type_name(tensor: paddle.Tensor) -> str:
    """Paddle's name of a tensor's element type, for example "bfloat16"."""
    return str(tensor.dtype).rsplit(".", 1)[-1]


class ParameterBuffer:
    """A tensor of this rank that is filled row by row along its first axis. It is allocated if it has no memory yet."""

    def __init__(self, tensor: paddle.Tensor) -> None:
        self.tensor = tensor
        if not tensor._is_initialized():
            paddle.empty(tensor.shape, tensor.dtype)._share_buffer_to(tensor)
            tensor.set_init_func(None)  # as parameter.initialize() does
        self.array: np.ndarray | None = None  # the same memory, if it is on the host
        if tensor.place.is_cpu_place():
            memory = TensorView(tensor, output=True).array
            self.array = memory.view(array_type(type_name(tensor))).reshape(tuple(tensor.shape))

    def rows(self, begin: int, end: int) -> paddle.Tensor:
        """Some rows as a tensor in the same memory."""
        with paddle.no_grad():
            return self.tensor._slice(begin, end) if self.tensor.ndim else self.tensor

    def put(self, begin: int, end: int, values: np.ndarray) -> None:
        """Copy values of any float type into some rows."""
        if self.array is not None:
            rows = self.array[begin:end] if self.array.ndim else self.array
            populate(rows)
            copy_array(rows, values)
        else:
            part = self.rows(begin, end)
            part.copy_(to_tensor(values, array_type(type_name(part))), True)


def cut_rows(tensor_slice: TensorSlice, whole: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Cut rows of a slice out of a whole tensor, without copying the rest of the slice."""
    if tensor_slice.axis != 0:
        return tensor_slice.cut(whole[begin:end] if whole.ndim else whole)
    found, at = [], 0
    for start, length in tensor_slice.runs:
        first, last = max(begin, at), min(end, at + length)
        if first < last:
            found.append(whole[start + first - at : start + last - at])
        at += length
    return found[0] if len(found) == 1 else np.concatenate(found)


def to_tensor(values: np.ndarray, dtype: np.dtype) -> paddle.Tensor:
    """Make a tensor on the current device."""
    if values.dtype != dtype or not values.flags.c_contiguous:
        values, source = np.empty(values.shape, dtype), values
        copy_array(values, source)
    return paddle.to_tensor(values.view(np.uint16) if dtype == ml_dtypes.bfloat16 else values)
