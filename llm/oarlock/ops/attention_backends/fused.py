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
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale query key^T + mask) value, [batch, queries, heads, value_dim], all float32.

    Tiles that are masked completely are skipped, so that time is linear in tokens x window. A query without any key
    gives 0. Gradients flow to query, key, value and sinks.

    Args:
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, key heads, head_dim]; heads is a multiple of key heads.
        value: [batch, keys, key heads, value_dim].
        ends: of a causal mask, see oarlock.ops.attention_backends.masks.
        bias: float32 [batch, 1 or heads, queries, keys], added to the scores. Nothing else is masked then.
        scale: of the scores, by default 1 / sqrt(head_dim).
        window, soft_cap, sinks: see oarlock.ops.attention.attend. A bias and a window exclude each other.

    Raises:
        ValueError: if shapes or types don't fit.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    tensors = query, key, value, ends, bias, [] if sinks is None else [sinks]
    return library.run("oarlock_attention", *tensors, scale, bias is None, window or 0, soft_cap or 0.0)[0]
