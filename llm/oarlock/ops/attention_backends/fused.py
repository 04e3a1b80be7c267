"""Attention on a CPU in tiles, with memory linear in the number of tokens (custom_ops/attention)."""

from __future__ import annotations

import math

from oarlock.ops import library
from oarlock.typing import Tensor


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale query key^T + mask) value, [batch, queries, heads, head_dim], all float32.

    Tiles that are masked completely are skipped. A query without any key gives 0. Gradients flow to query, key and
    value.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, key heads, head_dim]; heads is a multiple of key heads.
        ends: of a causal mask, see oarlock.ops.attention_backends.masks.
        bias: float32 [batch, 1 or heads, queries, keys], added to the scores. Nothing else is masked then.
        scale: of the scores, by default 1 / sqrt(head_dim).

    Raises:
        ValueError: if shapes or types don't fit.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return library.run("oarlock_attention", query, key, value, ends, bias, scale, bias is None)[0]
