"""CPU tensors as NumPy arrays that share their memory, and reductions with the same bits on every rank."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from oarlock.errors import EnvironmentProblem

# NumPy lacks these types; their bits are sent as unsigned integers.
_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
# Ranks exchange the index in this tuple.
TYPE_NAMES = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16", "float32",
    "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
REDUCTIONS = ("sum", "max", "min", "product", "average")  # in the order of paddle.distributed.ReduceOp
_UFUNCS: tuple[np.ufunc, ...] = (np.add, np.maximum, np.minimum, np.multiply, np.add)
_BLOCK = 1 << 16  # elements reduced at a time, so they stay in the core's cache


def name_of(names: Sequence[str], number: int) -> str:
    """The name for a number that another rank has sent, whatever the number is."""
    return names[number] if 0 <= number < len(names) else f"(number {number})"


class ElementType(NamedTuple):
    """A tensor's element type."""

    name: str
    code: int
    array: np.dtype
    itemsize: int


@functools.cache
def find_element_type(dtype: Any) -> ElementType:
    """The element type of a paddle dtype.

    Raises:
        TypeError: tensors of this type can't be sent.
    """
    name = str(dtype).removeprefix("paddle.")
    if name not in TYPE_NAMES:
        raise TypeError(f"tensors of {name} can't be sent between CPU ranks")
    array = np.dtype(_BITS.get(name, name))
    return ElementType(name, TYPE_NAMES.index(name), array, array.itemsize)


class TensorView:
    """The elements of a tensor as a flat array that shares its memory.

    If the tensor is not contiguous, the array is a copy, which `write_back` copies to the tensor. As with Paddle's own
    groups, the version of the tensor that autograd checks does not change.

    Attributes:
        array: [number of elements]; bfloat16 as uint16, etc.
        bytes: the same, uint8.
    """

    __slots__ = ("_strided", "_tensor", "_whole", "array", "bytes", "kind", "nbytes", "shape")

    def __init__(self, tensor: Any, output: bool = False) -> None:
        self._tensor = tensor  # keeps the memory alive
        self._strided: np.ndarray | None = None
        self.shape, self.kind = tuple(tensor.shape), find_element_type(tensor.dtype)
        self.nbytes = math.prod(self.shape) * self.kind.itemsize
        address = tensor.data_ptr() if self.nbytes else 0
        if not self.nbytes:
            self.array = np.empty(0, self.kind.array)
        elif not address:
            if not output:
                raise ValueError(f"can't send a tensor of shape {list(tensor.shape)} that has no data")
            import paddle

            paddle.empty(tensor.shape, dtype=tensor.dtype)._share_buffer_to(tensor)
            address = int(tensor.data_ptr())
        if self.nbytes:
            if not tensor.place.is_cpu_place():
                raise EnvironmentProblem(f"a tensor on {tensor.place} was given to a group of CPU ranks")
            if tensor.is_contiguous():
                memory = (ctypes.c_uint8 * self.nbytes).from_address(address)
                self.array = np.frombuffer(memory, dtype=self.kind.array)
            else:
                size, strides = self.kind.itemsize, tensor.strides
                last = sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
                area: Any = (ctypes.c_uint8 * ((last + 1) * size)).from_address(address)
                self._strided = np.ndarray(self.shape, self.kind.array, area, strides=[each * size for each in strides])
                self.array = np.ascontiguousarray(self._strided).reshape(-1)
        self._whole, self.bytes = self.array, self.array.view(np.uint8)

    def select_part(self, num_parts: int, index: int) -> TensorView:
        """Restrict the view to one of num_parts equal parts of the elements; returns itself."""
        if len(self._whole) % num_parts:
            raise ValueError(f"a tensor of {len(self._whole):,} elements can't be split into {num_parts} equal parts")
        size = len(self._whole) // num_parts
        self.array = self._whole[index * size : (index + 1) * size]
        self.bytes, self.nbytes = self.array.view(np.uint8), self.array.nbytes
        return self

    def write_back(self) -> None:
        """Copy the array to the tensor, if they don't share memory."""
        if self._strided is not None:
            self._strided[...] = self._whole.reshape(self.shape)


def reduce_arrays(out: np.ndarray, parts: Sequence[np.ndarray], kind: ElementType, reduction: int) -> None:
    """out = parts[0] + parts[1] + ..., in this order. `out` may share memory with parts[0] or parts[1] only.

    bfloat16 and float16 are reduced in float32 and rounded once. Averages of integers are rounded down.

    Args:
        out: flat, of the parts' length and type.
        reduction: index into REDUCTIONS.
    """
    reduce = _in_float32 if kind.name in ("bfloat16", "float16") else _in_place
    if (reduction == 4 and kind.name == "bool") or kind.name.startswith("float8"):
        raise TypeError(f"{REDUCTIONS[reduction]} of {kind.name} tensors is not defined")
    with np.errstate(all="ignore"):  # training detects overflows and NaN
        for begin in range(0, len(out), _BLOCK):
            block = slice(begin, begin + _BLOCK)
            reduce(out[block], [part[block] for part in parts], kind, reduction)


def _in_place(out: np.ndarray, parts: Sequence[np.ndarray], kind: ElementType, reduction: int) -> None:
    combine = _UFUNCS[reduction]
    if len(parts) == 1:
        out[...] = parts[0]
    else:
        combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)
    if reduction == 4:
        divide: Callable[..., Any] = np.floor_divide if kind.array.kind in "iu" else np.divide
        divide(out, len(parts), out=out)


def _in_float32(out: np.ndarray, parts: Sequence[np.ndarray], kind: ElementType, reduction: int) -> None:
    total = _widened(parts[0], kind)
    for part in parts[1:]:
        _UFUNCS[reduction](total, _widened(part, kind), out=total)
    if reduction == 4:
        total /= len(parts)
    if kind.name == "float16":
        out[...] = total.astype(np.float16)
        return
    bits = total.view(np.uint32)  # to nearest, ties to even; NaN stays NaN
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    out[...] = np.where(np.isnan(total), 0x7FC0, rounded).astype(np.uint16)


def _widened(part: np.ndarray, kind: ElementType) -> np.ndarray:
    if kind.name == "float16":
        return part.astype(np.float32)
    return (part.astype(np.uint32) << 16).view(np.float32)
