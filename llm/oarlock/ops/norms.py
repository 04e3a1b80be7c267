"""RMSNorm and LayerNorm in one pass over memory, forward and backward (custom_ops/rms_norm).

y = (h - mean) * invvar * scale + bias over the last axis, with invvar = 1 / sqrt(mean((h - mean)^2) + epsilon); mean
and bias are LayerNorm's alone. Tensors are float32, float16 or bfloat16, computed in float32. y is of scale's type (as
PaddleNLP's RMSNorm gives it), mean and invvar are float32. Gradients flow through y (and the sum) alone.

RMSNorm: https://arxiv.org/abs/1910.07467. The names are those of PaddleNLP's custom op `fused_ln`.
"""

from __future__ import annotations

from typing import Any

from oarlock.ops import library

Tensor = Any


def fused_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm: x [..., n], scale [n] -> y [..., n], invvar [...]."""
    return tuple(library.run("fused_rms_norm", x, scale, epsilon))


def fused_ln(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm: x [..., n], scale and bias [n] -> y [..., n], mean [...], invvar [...]."""
    return tuple(library.run("fused_ln", x, scale, bias, epsilon))


def fused_add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x + residual: x, residual [..., n], scale [n] -> y [..., n], x + residual [..., n], invvar [...]."""
    return tuple(library.run("fused_add_rms_norm", x, residual, scale, epsilon))
