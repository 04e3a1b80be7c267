"""The base model's weights as an adapter saw them in training."""

from __future__ import annotations

import numpy as np

from oarlock.environment.console import log_once
from oarlock.merge.inputs import AdapterMix
from oarlock.peft.qlora import block_axis
from oarlock.peft.quantization import Quantization
from oarlock.weights.buffers import row_ranges
from oarlock.weights.sources import WeightSource

_ROWS_BYTES = 8 << 20  # that are rounded at a time


class DequantizedBase:
    """A source of whole tensors that gives quantised weights as what they stood for in training (see WeightSource).

    A QLoRA adapter corrects the de-quantised weights: added to the exact ones it would give another model than the one
    that was trained.
    """

    def __init__(self, source: WeightSource, mix: AdapterMix) -> None:
        self._source = source
        self.place, self.shapes, self.read_ahead = source.place, source.shapes, source.read_ahead
        self._how = Quantization(**mix.quantization) if mix.quantization else None
        self._rounded = {f"{layer}.weight" for layer in mix.layers}
        if self._how is not None:
            log_once(
                f"{source.place}: merging with the weights as they were in training, rounded to {self._how.algorithm} "
                f"in blocks of {self._how.block_size}"
            )

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """See WeightSource."""
        if self._how is None or name not in self._rounded:
            return self._source.read(name, into)
        return _base_value(self._source.read(name), block_axis(name), self._how)

    def in_place(self, name: str, into: np.ndarray) -> bool:
        """See WeightSource."""
        return (self._how is None or name not in self._rounded) and self._source.in_place(name, into)

    def close(self) -> None:
        """See WeightSource."""
        self._source.close()


def _base_value(weight: np.ndarray, axis: int, how: Quantization) -> np.ndarray:
    """What a weight was worth in training, float32: a few of its lines at a time, as no scale goes over several."""
    found = np.empty(weight.shape, np.float32)
    lines, values = (found.T, weight.T) if axis == 0 else (found, weight)
    for begin, end in row_ranges(lines.shape, 4, _ROWS_BYTES):
        lines[begin:end] = how.rounded(np.ascontiguousarray(values[begin:end]), 1)
    return found
