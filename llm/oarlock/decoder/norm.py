"""RMSNorm (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

from oarlock.decoder.linear import copy_to_ranks, set_slice
from oarlock.ops.patch import can_fuse
from oarlock.ops.rms_norm import fused_rms_norm
from oarlock.typing import Tensor


class RMSNorm(nn.Layer):
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last axis; computed in float32.

    Args:
        width: size of the last axis.
        offset: added to the weight (Gemma: 1, with weights around 0).
        is_per_head: it is applied to heads, of which a tensor-parallel rank has a part, and not to hidden states, of
            which it has some tokens under sequence parallelism. In either case the gradient is summed over the ranks.
    """

    def __init__(self, width: int, epsilon: float, config: Any, offset: float = 0.0, is_per_head: bool = False) -> None:
        super().__init__()
        initial = nn.initializer.Constant(1.0 - offset)
        self.weight = self.create_parameter([width], default_initializer=initial)
        self.epsilon, self.offset, self._config, self._is_per_head = epsilon, offset, config, is_per_head
        if config.sequence_parallel and not is_per_head:
            mark_as_sequence_parallel_parameter(self.weight)

    @property
    def scale(self) -> Tensor:
        """The factor of the normalized values, [width]."""
        weight = copy_to_ranks(self.weight, self._config) if self._is_per_head else self.weight
        return weight + self.offset if self.offset else weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in the type of the weight."""
        scale = self.scale
        if (self._config.use_fused_rms_norm and paddle.in_dynamic_mode()) or can_fuse(x, scale):
            return fused_rms_norm(x, scale, self.epsilon)[0]
        with paddle.amp.auto_cast(False):
            wide = x.astype("float32")
            normed = paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon) * wide
            return normed.astype(scale.dtype) * scale


class SplitRMSNorm(nn.Layer):
    """RMSNorm over all heads together, of which each tensor-parallel rank has a part (OLMo 2).

    Args:
        width: heads x head_dim, over all ranks.
    """

    def __init__(self, width: int, epsilon: float, config: Any) -> None:
        super().__init__()
        size = width // config.tensor_parallel_degree
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        set_slice(self.weight, (width,), 0, config)
        self._width, self._epsilon = width, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width / ranks] -> the same shape."""
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        wide = x.astype("float32")
        # Every rank uses the sum, so its gradient is summed over the ranks as well.
        total = collective._mp_allreduce(wide.square().sum(-1, keepdim=True), group=group)
        total = collective._c_identity(total, group=group)
        return (wide * paddle.rsqrt(total / self._width + self._epsilon)).astype(x.dtype) * self.weight
