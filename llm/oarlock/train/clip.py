"""Clipping by global norm that remembers the norm, for the log."""

from __future__ import annotations

import math

import paddle
from paddle import nn


class RecordingGlobalNormClip(nn.ClipGradByGlobalNorm):
    """nn.ClipGradByGlobalNorm with the norm of the last step kept.

    Args:
        clip_norm: gradients are scaled down to this global norm; 0 only measures.
    """

    def __init__(self, clip_norm: float) -> None:
        super().__init__(clip_norm if clip_norm > 0 else math.inf)
        self._norm: paddle.Tensor | None = None

    def last_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping; NaN before the first step."""
        return float(self._norm) if self._norm is not None else math.nan

    @paddle.no_grad()
    def _dygraph_clip(
        self, params_grads: list[tuple[paddle.Tensor, paddle.Tensor | None]]
    ) -> list[tuple[paddle.Tensor, paddle.Tensor | None]]:
        clipped = [(p, g) for p, g in params_grads if g is not None and getattr(p, "need_clip", True)]
        if not clipped:
            return params_grads
        squares = [paddle._C_ops.squared_l2_norm(g).astype("float32") for _, g in clipped]
        self._norm = paddle.sqrt(paddle.stack(squares).sum())
        if math.isinf(self.clip_norm):
            return params_grads
        # The same small constant as HybridParallelClipGrad's, so that parallel runs equal this one.
        scale = self.clip_norm / (paddle.maximum(self._norm, paddle.full([], self.clip_norm)) + 1e-6)
        for _, grad in clipped:
            grad.multiply_(scale.astype(grad.dtype))
        return params_grads
