"""RMSNorm (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

from oarlock.decoder.linear import find_runs
from oarlock.ops.patch import can_fuse
from oarlock.ops.rms_norm import fused_rms_norm
from oarlock.typing import Tensor
from oarlock.weights.tensor_slice import TensorSlice


class RMSNorm(nn.Layer):
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last axis; computed in float32.

    Args:
        width: size of the last axis.
        offset: added to the weight (Gemma: 1, with weights around 0).
        follows_sequence: under sequence parallelism, each rank norms only a part of the tokens, so that Fleet has to
            sum the gradients of the weight.
    """

    def __init__(
        self, width: int, epsilon: float, config: Any, offset: float = 0.0, follows_sequence: bool = True
    ) -> None:
        super().__init__()
        initial = nn.initializer.Constant(1.0 - offset)
        self.weight = self.create_parameter([width], default_initializer=initial)
        self.epsilon, self.offset, self._fused = epsilon, offset, config.use_fused_rms_norm
        if config.sequence_parallel and follows_sequence:
            mark_as_sequence_parallel_parameter(self.weight)

    @property
    def scale(self) -> Tensor:
        """The factor of the normalized values, [width]."""
        return self.weight + self.offset if self.offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in the type of the weight."""
        return rms_norm(x, self.scale, self.epsilon, self._fused)


def rms_norm(x: Tensor, scale: Tensor, epsilon: float, fused: bool = False) -> Tensor:
    """RMSNorm by the fused operator where it fits (or `fused` asks for it on a GPU), else by Paddle's."""
    if (fused and paddle.in_dynamic_mode()) or can_fuse(x, scale):
        return fused_rms_norm(x, scale, epsilon)[0]
    with paddle.amp.auto_cast(False):
        wide = x.astype("float32")
        normed = paddle.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * wide
        return normed.astype(scale.dtype) * scale


class SplitRMSNorm(nn.Layer):
    """RMSNorm over all heads together, of which each tensor-parallel rank has a part (OLMo 2).

    Args:
        width: heads x head_dim, over all ranks.
    """

    def __init__(self, width: int, epsilon: float, config: Any) -> None:
        super().__init__()
        degree, rank = config.tensor_parallel_degree, config.tensor_parallel_rank
        self.weight = self.create_parameter([width // degree], default_initializer=nn.initializer.Constant(1.0))
        self.weight.is_distributed = True
        self.weight.tensor_slice = TensorSlice((width,), 0, find_runs((width,), degree, rank))
        self._width, self._epsilon = width, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width / ranks] -> the same shape."""
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        wide = x.astype("float32")
        # Every rank uses the sum, so its gradient is summed over the ranks as well.
        total = collective._mp_allreduce(wide.square().sum(-1, keepdim=True), group=group)
        total = collective._c_identity(total, group=group)
        return (wide * paddle.rsqrt(total / self._width + self._epsilon)).astype(x.dtype) * self.weight


def sum_gradient_over_heads(weight: Tensor, config: Any) -> Tensor:
    """Return the weight, whose gradient is summed over tensor-parallel ranks: each applies it to its own heads."""
    if config.tensor_parallel_degree == 1:
        return weight
    return collective._c_identity(weight, group=fleet.get_hybrid_communicate_group().get_model_parallel_group())
