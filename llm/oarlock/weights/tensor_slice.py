"""A slice of a whole tensor as plain index ranges. Nothing here needs Paddle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a whole tensor along one axis.

    Attributes:
        shape: of the whole tensor.
        axis: that is sliced; None for the whole tensor.
        runs: (start, length) along the axis, in the order in which they follow each other in the slice.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.axis is None:
            return self.shape
        length = sum(length for _, length in self.runs)
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """Cut the slice out of a whole tensor, as a view if it is contiguous along the axis."""
        if self.axis is None:
            return whole
        slices = [whole[self._index(start, length)] for start, length in self.runs]
        return slices[0] if len(slices) == 1 else np.concatenate(slices, axis=self.axis)

    def put(self, values: np.ndarray, whole: np.ndarray) -> None:
        """Copy the values of the slice to their place in the whole tensor."""
        if self.axis is None:
            whole[...] = values
            return
        begin = 0
        for start, length in self.runs:
            whole[self._index(start, length)] = values[self._index(begin, length)]
            begin += length

    def _index(self, start: int, length: int) -> tuple[slice, ...]:
        assert self.axis is not None
        return (*(slice(None) for _ in range(self.axis)), slice(start, start + length))
