"""The base model's weights as an adapter saw them in training."""

from __future__ import annotations

from typing import Any

import numpy as np

from oarlock.environment import say_once
from oarlock.models.sources import WeightSource


class TrainedBase:
    """A source of whole tensors that gives quantised weights as what they stood for in training (see WeightSource).

    A QLoRA adapter corrects the de-quantised weights: added to the exact ones it would give another model than the one
    that was trained.
    """

    def __init__(self, source: WeightSource, quantized: dict[str, Any] | None) -> None:
        self._source, self._quantized = source, quantized
        self.place, self.shapes, self.read_ahead = source.place, source.shapes, source.read_ahead
        if quantized is not None:
            say_once(f"{source.place}: weights as they were quantised in training ({_text(quantized)}), de-quantised")

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """See WeightSource."""
        values = self._source.read(name, into)
        return values if self._quantized is None else base_value(name, values, self._quantized)

    def close(self) -> None:
        """See WeightSource."""
        self._source.close()


def base_value(name: str, weight: np.ndarray, quantized: dict[str, Any]) -> np.ndarray:
    """What a base weight was worth in training.

    Args:
        weight: whole, as it is stored.
        quantized: from the adapter's settings: algorithm, block_size, double.
    """
    return weight  # models.quantized will say


def _text(quantized: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in quantized.items())
