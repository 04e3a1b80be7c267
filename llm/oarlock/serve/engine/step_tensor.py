"""Tensors that a decoder fills anew in every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle


class StepTensor:
    """A tensor of whole numbers that is filled again and again.

    paddle.to_tensor (3.3) keeps a list of its arguments' names at each call: a short request would cost 1 KB of memory
    for ever. Setting the values of an existing tensor keeps nothing.
    """

    def __init__(self) -> None:
        self._tensor = paddle.zeros([1], "int64").cpu()

    def fill(self, values: Any) -> paddle.Tensor:
        """The values as int64 of any shape, on the CPU; valid until the next call."""
        self._tensor.get_tensor().set(np.asarray(values, np.int64), paddle.CPUPlace())
        return self._tensor

    def copy(self, values: Any) -> paddle.Tensor:
        """The values as a tensor of its own, on the device in use."""
        filled = self.fill(values)
        return filled.cuda() if paddle.device.get_device().startswith("gpu") else filled.clone()
