"""Attention in Paddle's ops: for any device and type, and for static graphs."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle.nn import functional

from oarlock.ops.attention_backends.masks import QueryBlock
from oarlock.typing import Tensor

_MASKED_SCORE = -1e30  # not -inf, with which softmax gives NaN for a query without keys


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention, [batch, queries, heads, value_dim]. A query without keys gives 0.

    Args:
        query, key, value, scale, soft_cap, sinks, dropout: see oarlock.ops.attention.attend.
        mask: bool [batch or 1, heads or 1, queries, keys], true if a query attends to a key.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if query.dtype == paddle.float16:  # products of large heads would overflow
        query, scale = query * scale, 1.0
    query, key, value = (tensor.transpose([0, 2, 1, 3]) for tensor in (query, key, value))
    # The queries of all heads that share a key head form one matrix, so that keys need not be repeated. In a shape, 0
    # keeps the size and -1 is inferred: a static graph does not know the sizes.
    query = query.reshape([0, kv_heads, -1, query.shape[3]])
    scores = paddle.matmul(query, key, transpose_y=True).reshape([0, heads, -1, 0]).astype("float32") * scale
    if soft_cap is not None:
        scores = soft_cap * paddle.tanh(scores / soft_cap)
    scores = paddle.where(mask, scores, paddle.full_like(scores, _MASKED_SCORE))
    if sinks is None:
        weights = functional.softmax(scores)
    else:
        sink_scores = paddle.zeros_like(scores[..., :1]) + sinks.astype("float32").reshape([1, heads, 1, 1])
        weights = functional.softmax(paddle.concat([scores, sink_scores], axis=-1))[..., :-1]
    if dropout:
        weights = functional.dropout(weights, dropout)
    weights = weights.astype(value.dtype).reshape([0, kv_heads, -1, 0])
    output = paddle.matmul(weights, value).reshape([0, heads, -1, value.shape[3]])
    # Softmax gives a query without keys the mean of all values, or weights of exp(-64) if there is a sink.
    output = output * mask.any(axis=-1, keepdim=True).astype(output.dtype)
    return output.transpose([0, 2, 1, 3])


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[QueryBlock],
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the same as reference_attention, in memory that does not grow with the square of a row.

    Args:
        blocks: of all rows, in order (oarlock.ops.attention_backends.masks.make_query_blocks).
    """
    outputs = [
        reference_attention(
            query[block.row : block.row + 1, block.start : block.stop],
            key[block.row : block.row + 1, block.first_key : block.stop],
            value[block.row : block.row + 1, block.first_key : block.stop],
            block.mask, scale, soft_cap, sinks, dropout,
        )
        for block in blocks
    ]  # fmt: skip
    return paddle.concat(outputs, axis=1).reshape([*query.shape[:3], value.shape[3]])
