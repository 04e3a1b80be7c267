"""Attention and its gradients in float64, from the definition, and masks to try it with."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray
KINDS = ("causal", "packed", "left padding", "right padding", "holes")


def exact_attention(
    query: Array, key: Array, value: Array, grad: Array, seen: Array, scale: float, *, bias: Any = 0,
    soft_cap: float | None = None, sinks: Array | None = None,
) -> list[Array]:  # fmt: skip
    """The output, and the gradients of query, key, value and, if there are any, sinks.

    seen is bool and bias float, both to be broadcast to [batch, heads, queries, keys].
    """
    query, key, value, grad = (array.astype(np.float64) for array in (query, key, value, grad))
    batch, keys, kv_heads = key.shape[:3]
    groups = query.shape[2] // kv_heads
    all_keys, all_values = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
    scores = np.einsum("bihd,bjhd->bhij", query, all_keys) * scale
    bent = np.tanh(scores / soft_cap) if soft_cap else 0
    scores = (soft_cap * bent if soft_cap else scores) + bias
    seen = np.broadcast_to(seen, scores.shape)
    of_sinks = np.full([1, scores.shape[1], 1, 1], -np.inf)
    if sinks is not None:
        of_sinks = sinks.astype(np.float64).reshape(1, -1, 1, 1)
    largest = np.maximum(np.where(seen, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf), of_sinks)
    largest = np.where(np.isfinite(largest), largest, 0)
    weights = np.where(seen, np.exp(scores - largest), 0)
    sink_weights = np.exp(of_sinks - largest)
    total = weights.sum(-1, keepdims=True) + sink_weights
    total = np.where(total > 0, total, 1)
    weights, sink_weights = weights / total, sink_weights / total
    of_weights = np.einsum("bihd,bjhd->bhij", grad, all_values)
    delta = (weights * of_weights).sum(-1, keepdims=True)
    of_scores = weights * (of_weights - delta) * (1 - bent**2) * scale
    by_key = [np.einsum("bhij,bihd->bjhd", a, b) for a, b in ((of_scores, query), (weights, grad))]
    return [
        np.einsum("bhij,bjhd->bihd", weights, all_values),
        np.einsum("bhij,bjhd->bihd", of_scores, all_keys),
        *(array.reshape(batch, keys, kv_heads, groups, array.shape[-1]).sum(3) for array in by_key),
        *([] if sinks is None else [-(sink_weights * delta).sum((0, 2, 3))]),
    ]


def make_ends(random: np.random.Generator, kind: str, batch: int, keys: int) -> Array:
    """int32 [batch, keys] of oarlock.ops.attention.AttentionMask."""
    ends = np.full((batch, keys), keys, np.int32)
    if kind == "packed":
        for row in ends:
            cuts = np.sort(random.integers(0, keys + 1, keys // 40 + 1)).tolist()
            for start, stop in zip([0, *cuts], [*cuts, keys], strict=True):
                row[start:stop] = stop
    elif kind == "left padding":
        ends[:, : keys // 3] = 0
    elif kind == "right padding":
        ends[-1, keys - keys // 3 :] = 0
    elif kind == "holes":
        ends[random.random(ends.shape) < 0.3] = 0
    return ends


def make_seen(queries: int, keys: int, ends: Array | None = None, window: int | None = None) -> Array:
    """The causal mask, bool [batch or 1, 1, queries, keys]."""
    places, seeing = np.arange(keys), np.arange(queries)[:, None] + keys - queries
    seen = (places <= seeing) & (places > seeing - (window or keys + queries))
    return seen[None, None] if ends is None else (seen & (seeing < ends[:, None]))[:, None]
