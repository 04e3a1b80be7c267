"""Tensors that a decoder needs anew in every step.

paddle.to_tensor (3.3) leaves a list of its arguments' names behind at each call: a short request costs 1 KB of memory
for ever. A tensor that is there already can be given other values without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle


class StepTensor:
    """Whole numbers."""

    def __init__(self) -> None:
        self._tensor = paddle.zeros([1], "int64").cpu()

    def holding(self, values: Any) -> paddle.Tensor:
        """int64 of any shape, on the CPU; until the next call."""
        self._tensor.get_tensor().set(np.asarray(values, np.int64), paddle.CPUPlace())
        return self._tensor

    def copy_of(self, values: Any) -> paddle.Tensor:
        """The same as a tensor of its own, on the device in use."""
        held = self.holding(values)
        return held.cuda() if paddle.device.get_device().startswith("gpu") else held.clone()
