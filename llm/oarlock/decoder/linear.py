"""Tensor parallelism: linear layers of Fleet's classes, and the slices that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from paddle import nn
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    ColumnSequenceParallelLinear,
    RowSequenceParallelLinear,
)

from oarlock.typing import Tensor
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
    width = sum(parts)
    if config.tensor_parallel_degree == 1 or not split:
        return nn.Linear(inputs, width, bias_attr=None if bias else False)
    if split == "row":
        layer = (RowSequenceParallelLinear if config.sequence_parallel else RowParallelLinear)(
            inputs, width, has_bias=bias, input_is_parallel=True
        )
        set_slice(layer.weight, (inputs, width), 0, config)
        return layer
    layer = (ColumnSequenceParallelLinear if config.sequence_parallel else ColumnParallelLinear)(
        inputs, width, has_bias=bias, gather_output=False
    )
    set_slice(layer.weight, (inputs, width), 1, config, parts)
    if bias:
        set_slice(layer.bias, (width,), 0, config, parts)
    return layer


def set_slice(parameter: Tensor, shape: tuple[int, ...], axis: int, config: Any, parts: Sequence[int] = ()) -> None:
    """Record which slice of a whole tensor this tensor-parallel rank holds as a parameter.

    Args:
        shape: of the whole tensor.
        axis: the split one.
        parts: sizes along the axis of what is split separately; by default it is one part.
    """
    degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
    parameter.tensor_slice = TensorSlice(shape, axis, find_runs(parts or (shape[axis],), degree, rank))
    parameter.is_distributed = True


def find_runs(parts: Sequence[int], degree: int, rank: int) -> tuple[tuple[int, int], ...]:
    """The index ranges (start, length) of a rank in an axis of several parts, each of which is split evenly."""
    starts = (0, *accumulate(parts))
    return tuple((start + rank * part // degree, part // degree) for start, part in zip(starts, parts, strict=False))


def copy_to_ranks(x: Tensor, config: Any) -> Tensor:
    """Return x, with a gradient that is summed over the tensor-parallel ranks, each of which uses all of x.

    Megatron-LM's copy_to_tensor_model_parallel_region ("f" in https://arxiv.org/abs/1909.08053, figure 3).
    """
    if config.tensor_parallel_degree == 1:
        return x
    return collective._c_identity(x, group=fleet.get_hybrid_communicate_group().get_model_parallel_group())
