"""Rotary position embedding, forward and backward in one pass over memory (custom_ops/rotary). Float32 on the CPU."""

from __future__ import annotations

from oarlock.ops import library
from oarlock.typing import Tensor


def fused_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply rotary position embedding to q and k: x * cos + rotate_half(x) * sin (https://arxiv.org/abs/2104.09864).

    Args:
        q, k: [batch, length, heads, dim]; their numbers of heads may differ.
        cos, sin: [positions, dim]; further axes of size 1 are allowed.
        positions: int64 [batch, length]. None: every row counts from 0.

    Raises:
        ValueError: if a position is outside cos and sin, or shapes don't fit.
    """
    return tuple(library.run("fused_rotary", q, k, cos, sin, positions))
