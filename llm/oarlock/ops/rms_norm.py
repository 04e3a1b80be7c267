"""RMSNorm and LayerNorm in one pass over memory, forward and backward (custom_ops/rms_norm).

    y = (x - mean) * invvar * scale + bias,  invvar = 1 / sqrt(mean((x - mean)^2) + epsilon)

over the last axis. RMSNorm (https://arxiv.org/abs/1910.07467) has neither mean nor bias. Tensors are float32, float16
or bfloat16 and are computed in float32. y has the type of scale, as in PaddleNLP's RMSNorm; mean and invvar are
float32. Gradients flow through y and the sum only. The names are those of PaddleNLP's custom op `fused_ln`.
"""

from __future__ import annotations

from oarlock.ops import library
from oarlock.typing import Tensor


def fused_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm: x [..., n], scale [n] -> y [..., n], invvar [...]."""
    return tuple(library.run("fused_rms_norm", x, scale, epsilon))


def fused_ln(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute LayerNorm: x [..., n], scale and bias [n] -> y [..., n], mean [...], invvar [...]."""
    return tuple(library.run("fused_ln", x, scale, bias, epsilon))


def fused_add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute RMSNorm of x + residual: x, residual [..., n], scale [n] -> y, x + residual [..., n], invvar [...]."""
    return tuple(library.run("fused_add_rms_norm", x, residual, scale, epsilon))


def fused_rms_norm_kept(x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute y of fused_rms_norm and pass x on, so that the backward sums the gradients of both in one pass.

    The second output shares the memory of x. Neither may be written to.
    """
    return tuple(library.run("fused_rms_norm_kept", x, scale, epsilon)[:2])


def reference_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Compute y of fused_rms_norm in Paddle's ops."""
    import paddle

    wide = x.astype("float32")
    normed = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed * scale.astype("float32")).astype(scale.dtype)
