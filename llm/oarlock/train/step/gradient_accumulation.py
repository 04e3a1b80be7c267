"""Gradient accumulation without a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import nn


def accumulate_gradients(
    model: nn.Layer,
    micro_batches: Sequence[dict[str, Any]],
    forward_backward: Callable[[nn.Layer, dict[str, Any]], paddle.Tensor],
) -> paddle.Tensor:
    """Run forward and backward of all micro-batches; returns the sum of their losses.

    Data-parallel ranks reduce the gradients with the last micro-batch only.
    """
    loss = paddle.zeros([])
    no_sync = getattr(model, "no_sync", None)  # paddle.DataParallel
    for batch in micro_batches[:-1]:
        with contextlib.nullcontext() if no_sync is None else no_sync():
            loss += forward_backward(model, batch)
    loss += forward_backward(model, micro_batches[-1])
    return loss
