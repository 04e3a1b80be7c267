"""A decoder layer in two operators, before and after its attention (custom_ops/decoder_layer). Float32 on the CPU."""

from __future__ import annotations

from oarlock.ops import library
from oarlock.typing import Tensor


def fused_layer_start(
    x: Tensor, scale: Tensor, query: Tensor, key: Tensor, value: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute query, key and value of RMSNorm(x).

    Args:
        x: [..., width]; scale: of the RMSNorm, [width]; query, key, value: weights [width, out], where out may differ.

    Returns:
        Query, key and value; x again for the residual, in the same memory; RMSNorm(x), without a gradient.

    Raises:
        ValueError: if shapes don't fit.
    """
    return tuple(library.run("fused_layer_start", x, scale, query, key, value, epsilon)[:5])


def fused_layer_end(
    heads: Tensor, residual: Tensor, output: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """Compute x + MLP(RMSNorm(x)) with x = residual + heads output: [..., width].

    Args:
        heads: outputs of the attention heads, [..., heads x dim]; residual: [..., width]; output: weight of the output
            projection, [heads x dim, width].
        scale: of the RMSNorm, [width]; gate, up: weights [width, inner]; down: [inner, width].

    Raises:
        ValueError: if shapes don't fit.
    """
    return library.run("fused_layer_end", heads, residual, output, scale, gate, up, down, epsilon)[0]
