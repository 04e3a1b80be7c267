"""Gradient clipping by global norm, under every plan."""

from __future__ import annotations

import math
from typing import Any

import paddle
from paddle import nn

from oarlock.parallel.expert_groups import find_expert_groups
from oarlock.train.optim.divided_experts import is_divided
from oarlock.weights.layout import shared_between_stages

SLICE = "slice@"  # prefix that GroupShardedStage3 gives to the names of sliced parameters


class GlobalNormClip(nn.clip.GradientClipBase):
    """Scale all gradients by min(1, clip_norm / global norm).

    Fleet has a clip for each of its wrappers (HybridParallelClipGrad, GroupShardedClipGrad), but none for stage 3 with
    tensor parallelism, and none that exposes the norm. This one works under every plan: each element of the model
    counts once, whichever ranks have it. It is no ClipGradByGlobalNorm, because Fleet would replace that.

    Args:
        clip_norm: largest global norm; 0 measures the norm without clipping.
    """

    def __init__(self, clip_norm: float) -> None:
        super().__init__()
        self.clip_norm = clip_norm if clip_norm > 0 else math.inf
        self._norm: paddle.Tensor | None = None
        self._groups: list[Any] = []
        experts = find_expert_groups()
        self._expert_groups: list[Any] = [] if experts is None else [experts.exchange]
        self._counted_elsewhere: set[str] = set()
        self._counts_unsliced = True

    def follow_plan(self, model: nn.Layer, hcg: Any) -> None:
        """Set up the reduction over ranks, before the model is wrapped.

        Args:
            model: this rank's model.
            hcg: Fleet's HybridCommunicateGroup.
        """
        groups = [
            hcg.get_model_parallel_group() if hcg.get_model_parallel_world_size() > 1 else None,
            hcg.get_sharding_parallel_group() if hcg.get_sharding_parallel_world_size() > 1 else None,
            hcg.get_pipe_parallel_group() if hcg.get_pipe_parallel_world_size() > 1 else None,
        ]
        self._groups = [group for group in groups if group is not None]
        if self._expert_groups:
            self._expert_groups += [group for group in (groups[0], groups[2]) if group is not None]
        self._counts_unsliced = hcg.get_sharding_parallel_rank() == 0
        counts_copies = hcg.get_model_parallel_rank() == 0
        shared = shared_between_stages(model)
        self._counted_elsewhere = {
            p.name
            for p in model.parameters()
            if not (p.is_distributed or counts_copies) or not shared.get(p.name, True)
        }

    def last_norm(self) -> float:
        """Global norm of the last step's gradients before clipping; NaN before the first step."""
        return float(self._norm) if self._norm is not None else math.nan

    @paddle.no_grad()
    def _dygraph_clip(
        self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor | None]]
    ) -> list[tuple[paddle.Tensor, paddle.Tensor | None]]:
        clipped = [(p, g) for p, g in params_grads if g is not None and getattr(p, "need_clip", True)]
        squares: list[paddle.Tensor] = []
        of_experts: list[paddle.Tensor] = []
        for p, g in clipped:  # one of the ranks that have the reduced gradient of a parameter counts it
            unsliced = hasattr(p, "unslice")  # too small for stage 3 to slice
            if (self._counts_unsliced or not unsliced) and p.name.removeprefix(SLICE) not in self._counted_elsewhere:
                square = paddle._C_ops.squared_l2_norm(g).astype("float32")
                (of_experts if is_divided(p) else squares).append(square)
        total = _sum_over(self._groups, squares)
        if self._expert_groups:
            total = total + _sum_over(self._expert_groups, of_experts)
        self._norm = paddle.sqrt(total)
        if math.isinf(self.clip_norm):
            return params_grads
        # As in torch.nn.utils.clip_grad_norm_. HybridParallelClipGrad also scales gradients that are small enough.
        scale = paddle.clip(self.clip_norm / (self._norm + 1e-6), max=1.0)
        for _, grad in clipped:
            grad.multiply_(scale.astype(grad.dtype))
        return params_grads


def _sum_over(groups: list[Any], squares: list[paddle.Tensor]) -> paddle.Tensor:
    total = paddle.stack(squares).sum() if squares else paddle.zeros([])
    for group in groups:
        paddle.distributed.all_reduce(total, group=group)
    return total
