"""SwiGLU, forward and backward in one pass over memory (custom_ops/swiglu). Float32 on the CPU."""

from __future__ import annotations

from oarlock.ops import library
from oarlock.typing import Tensor


def fused_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up (https://arxiv.org/abs/2002.05202).

    Args:
        gate: [..., inner]. Without `up`: [..., 2 * inner], gate in the first half of the last axis, up in the second.
        up: the shape of gate.
    """
    return library.run("fused_swiglu_halves", gate) if up is None else library.run("fused_swiglu", gate, up)
