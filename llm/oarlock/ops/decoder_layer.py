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
        The three products; x for the residual, which shares the memory of x; RMSNorm(x), without a gradient.

    Raises:
        ValueError: if shapes don't fit.
    """
    return tuple(library.run("fused_layer_start", x, scale, query, key, value, epsilon)[:5])


def fused_layer_end(
    attended: Tensor, kept: Tensor, output: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """Compute total + MLP(RMSNorm(total)) with total = kept + attended output: [..., width].

    Args:
        attended: [..., heads x dim]; kept: [..., width]; output: weight [heads x dim, width].
        scale: of the RMSNorm, [width]; gate, up: weights [width, inner]; down: [inner, width].

    Raises:
        ValueError: if shapes don't fit.
    """
    return library.run("fused_layer_end", attended, kept, output, scale, gate, up, down, epsilon)[0]
