"""The base model's weights as a QLoRA adapter saw them in training."""

from __future__ import annotations

import numpy as np

from oarlock.environment.console import log_once
from oarlock.merge.inputs import AdapterMix
from oarlock.peft.qlora import block_axis
from oarlock.peft.quantization import Quantization
from oarlock.weights.buffers import row_ranges
from oarlock.weights.sources import WeightSource

_CHUNK_BYTES = 8 << 20  # quantized at a time


class DequantizedBase:
    """A WeightSource that returns quantized weights with the values they had in training.

    A QLoRA adapter corrects the dequantized weights. Added to the exact ones it would make another model than the one
    that
    was trained.
    """

    def __init__(self, source: WeightSource, mix: AdapterMix) -> None:
        self._source = source
        self.place, self.shapes, self.read_ahead = source.place, source.shapes, source.read_ahead
        self._how = Quantization(**mix.quantization) if mix.quantization else None
        self._quantized = {f"{layer}.weight" for layer in mix.layers}
        if self._how is not None:
            log_once(
                f"{source.place}: merging with the weights of training, quantized to {self._how.algorithm} in "
                f"blocks of {self._how.block_size}"
            )

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        if self._how is None or name not in self._quantized:
            return self._source.read(name, into)
        weight = self._source.read(name)
        found = np.empty(weight.shape, np.float32)
        # In chunks of lines, as no scale covers several lines.
        lines, values = (found.T, weight.T) if block_axis(name) == 0 else (found, weight)
        for begin, end in row_ranges(lines.shape, 4, _CHUNK_BYTES):
            lines[begin:end] = self._how.round_trip(np.ascontiguousarray(values[begin:end]), 1)
        return found

    def in_place(self, name: str, into: np.ndarray) -> bool:
        return (self._how is None or name not in self._quantized) and self._source.in_place(name, into)

    def close(self) -> None:
        self._source.close()
