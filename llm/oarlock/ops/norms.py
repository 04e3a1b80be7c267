"""RMSNorm and LayerNorm in one pass over memory, forward and backward (custom_ops/rms_norm).

y = (h - mean) * invvar * scale + bias over the last axis, with invvar = 1 / sqrt(mean((h - mean)^2) + epsilon); mean
and bias are LayerNorm's alone. Tensors are float32, float16 or bfloat16, computed in float32. y is of scale's type (as
PaddleNLP's RMSNorm gives it), mean and invvar are float32. Gradients flow through y (and the sum) alone.

RMSNorm: https://arxiv.org/abs/1910.07467. The names are those of PaddleNLP's custom op `fused_ln`.
"""

from __future__ import annotations

import functools
from typing import Any

from oarlock.errors import EnvironmentProblem
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


def fused_rms_norm_kept(x: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y of fused_rms_norm, and x for its other uses: the gradients of both are summed where the norm's is made.

    The second is x's own memory: neither may be written to.
    """
    return tuple(library.run("fused_rms_norm_kept", x, scale, epsilon)[:2])


def reference_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """y of fused_rms_norm in Paddle's ops."""
    import paddle

    wide = x.astype("float32")
    normed = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normed * scale.astype("float32")).astype(scale.dtype)


@functools.cache
def check_norms() -> None:
    """Load the operators and compare them with the reference, values and gradients, on this process's device.

    Raises:
        ImportError: when they are not built.
        EnvironmentProblem: when they compute something else; training with them would go wrong without a word.
    """
    import paddle

    library.load()
    rows = paddle.arange(3 * 37, dtype="float32").reshape([3, 37])
    wave, scale = (rows * 0.7).sin() * 3 + 0.5, (rows[0] * 0.3).cos() + 1
    wave.stop_gradient = scale.stop_gradient = False
    fused, reference = (
        [y, *paddle.grad([y], [wave, scale], [(rows * 0.1).sin()])]
        for y in (fused_rms_norm(wave, scale, 1e-5)[0], reference_rms_norm(wave, scale, 1e-5))
    )
    for name, found, wanted in zip(("y", "x's gradient", "scale's gradient"), fused, reference, strict=True):
        difference = float((found - wanted).abs().max())
        if not difference <= 1e-4:  # NaN too
            raise EnvironmentProblem(
                f"the fused RMSNorm is wrong on this machine: {name} differs from the reference by {difference:.3g}. "
                "Build it again (rm -r build/custom_ops; python custom_ops/build.py), or train without "
                "--use_fused_rms_norm"
            )
