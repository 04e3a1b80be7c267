"""A part of a whole tensor in plain index ranges; knows nothing of Paddle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TensorSlice:
    """A part of a whole tensor.

    Attributes:
        shape: of the whole tensor.
        axis: along which it is cut; None for the whole of it.
        runs: (start, length) along the axis, in the order in which they follow each other in the part.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.axis is None:
            return self.shape
        length = sum(length for _, length in self.runs)
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """The part, as a view where it is in one piece."""
        if self.axis is None:
            return whole
        slices = [whole[self._index(start, length)] for start, length in self.runs]
        return slices[0] if len(slices) == 1 else np.concatenate(slices, axis=self.axis)

    def put(self, part: np.ndarray, whole: np.ndarray) -> None:
        """Copy the part to its place in the whole."""
        if self.axis is None:
            whole[...] = part
            return
        begin = 0
        for start, length in self.runs:
            whole[self._index(start, length)] = part[self._index(begin, length)]
            begin += length

    def _index(self, start: int, length: int) -> tuple[slice, ...]:
        assert self.axis is not None
        return (*(slice(None) for _ in range(self.axis)), slice(start, start + length))
