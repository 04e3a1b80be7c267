"""Attention on a GPU by Paddle's FlashAttention (https://arxiv.org/abs/2307.08691) and FlashMask
(https://arxiv.org/abs/2410.01359)."""

from __future__ import annotations

import math

import paddle
from paddle.nn import functional

from oarlock.typing import Tensor

_LARGEST_HEAD = 256


def find_flash_limits(query: Tensor, key: Tensor, value: Tensor) -> dict[str, bool]:
    """Name what FlashAttention does not support, and whether these tensors have it."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        f"{str(query.dtype).removeprefix('paddle.')} tensors": query.dtype not in (paddle.float16, paddle.bfloat16),
        f"heads of {dim}": dim > _LARGEST_HEAD or dim % 8 != 0,
        "heads of values that are larger than those of keys": value_dim > dim,
        "keys of earlier tokens": query.shape[1] != key.shape[1],
    }


def flash_attention(query: Tensor, key: Tensor, value: Tensor, row_indices: Tensor | None, scale: float) -> Tensor:
    """Compute causal attention, [batch, tokens, heads, value_dim].

    Args:
        query, key, value: see oarlock.ops.attention.attend.
        row_indices: int32 [batch, 1, tokens, 1], for each key the first query that does not attend to it.
        scale: of the scores.
    """
    dim, value_dim = query.shape[-1], value.shape[-1]
    factor = scale * math.sqrt(dim)
    if abs(factor - 1) > 1e-6:  # FlashAttention-2 scales by 1 / sqrt(dim) only
        query = query * factor
    if value_dim < dim:  # it takes heads of one size only
        value = paddle.concat([value, paddle.zeros([*value.shape[:3], dim - value_dim], value.dtype)], axis=-1)
    if row_indices is None:
        output, _ = functional.flash_attention.flash_attention(query, key, value, causal=True)
    else:
        output = functional.flashmask_attention(query, key, value, row_indices, causal=True)
    return output if value_dim == dim else output[..., :value_dim]
