"""Linear layers that tensor parallelism splits, with Fleet's classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from paddle import nn
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    ColumnSequenceParallelLinear,
    RowSequenceParallelLinear,
)

from oarlock.weights.tensor_slice import TensorSlice

Split = Literal["", "column", "row"]


def make_linear(
    inputs: int, outputs: int | Sequence[int], config: Any, *, split: Split = "", bias: bool = False
) -> nn.Layer:
    """Make this rank's part of a linear layer. `tensor_slice` of a parameter says which slice of the whole it is.

    Args:
        inputs, outputs: sizes of the whole matrix. Several outputs are the parts of a packed matrix; each is split.
        split: what tensor parallelism splits: outputs ("column") or inputs ("row"). A "row" layer takes the features
            that a "column" one leaves on the rank (Megatron-LM, https://arxiv.org/abs/1909.08053, section 3).
    """
    parts = (outputs,) if isinstance(outputs, int) else tuple(outputs)
    width, degree, rank = sum(parts), config.tensor_parallel_degree, config.tensor_parallel_rank
    if degree == 1 or not split:
        return nn.Linear(inputs, width, bias_attr=None if bias else False)
    if split == "row":
        layer = (RowSequenceParallelLinear if config.sequence_parallel else RowParallelLinear)(
            inputs, width, has_bias=bias, input_is_parallel=True
        )
        layer.weight.tensor_slice = TensorSlice((inputs, width), 0, find_runs((inputs,), degree, rank))
        return layer
    layer = (ColumnSequenceParallelLinear if config.sequence_parallel else ColumnParallelLinear)(
        inputs, width, has_bias=bias, gather_output=False
    )
    runs = find_runs(parts, degree, rank)
    layer.weight.tensor_slice = TensorSlice((inputs, width), 1, runs)
    if bias:
        layer.bias.tensor_slice = TensorSlice((width,), 0, runs)
    return layer


def find_runs(parts: Sequence[int], degree: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The index ranges (start, length) of a rank in an axis of several parts, each of which is split evenly."""
    starts = (0, *accumulate(parts))
    return tuple((start + rank * part // degree, part // degree) for start, part in zip(starts, parts, strict=False))
