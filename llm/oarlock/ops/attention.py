"""Attention of our decoder: attend() chooses the fastest backend that supports its tensors.

- On a CPU with the fused operators: in tiles (oarlock.ops.attention_backends.fused).
- On a GPU, if flash attention is wanted: Paddle's FlashAttention and FlashMask (flash).
- Everywhere else, and in static graphs: Paddle's ops (reference), on a CPU block by block for packed rows and windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle

from oarlock.environment.console import log_once
from oarlock.ops.attention_backends.flash import find_flash_limits, flash_attention, is_on_gpu
from oarlock.ops.attention_backends.fused import fused_attention
from oarlock.ops.attention_backends.masks import make_dense_mask, make_query_blocks, make_row_indices, make_window_mask
from oarlock.ops.attention_backends.reference import attend_in_blocks, reference_attention
from oarlock.ops.patch import can_fuse
from oarlock.typing import Tensor

_LOWEST = -1e4  # an additive mask hides a key by this value or less


@dataclass(frozen=True)
class AttentionMask:
    """The keys that queries attend to. All layers of a forward pass share one mask, and all that is derived from it.

    Attributes:
        ends: int32 [batch, keys]: a causal mask. Of the keys up to its own position, a query attends to those whose end
            is after its position: keys of a packed example have the position at which the example ends, padding has 0,
            all other keys have the number of keys. None: to all of them.
        dense: bool [batch or 1, heads or 1, queries, keys], true if a query attends to a key. It replaces the causal
            mask.
        flash: Paddle's flash attention may be used.
    """

    ends: Tensor | None = None
    dense: Tensor | None = None
    flash: bool = False
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derive(self, name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return another form of this mask, which is made once for all layers."""
        if not paddle.in_dynamic_mode():
            return make()
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]


@paddle.jit.not_to_static  # Paddle need not translate it: its control flow depends on no values of tensors
def make_mask(mask: Tensor | None = None, ends: Tensor | None = None, flash: bool = False) -> AttentionMask:
    """Make a mask from what a model gets.

    Args:
        mask: [batch, keys], nonzero for text; or [batch, queries, keys] or [batch, 1 or heads, queries, keys], which
            is a complete mask: bool or integers, nonzero for keys that a query attends to, or floats to be added to
            the scores, 0 or below -1e4.
        ends: of packed rows, int32 [batch, keys], [batch, 1, keys] or [batch, 1, keys, 1].
        flash: Paddle's flash attention may be used.

    Raises:
        ValueError: if there is no such mask.
    """
    if ends is not None and ends.ndim > 2:
        ends = ends.reshape([0, -1])
    if mask is None or mask.ndim == 2:
        if mask is None:
            return AttentionMask(ends, None, flash)
        text = mask.astype("bool").astype("int32")
        return AttentionMask(text * (_get_size(mask, 1) if ends is None else ends), None, flash)
    if ends is not None or mask.ndim not in (3, 4):
        raise ValueError(
            "an attention mask has to be [batch, keys], [batch, queries, keys] or [batch, heads, queries, keys], "
            f"and only the first together with the ends of packed examples; got {list(mask.shape)}"
        )
    dense = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if not dense.is_floating_point():
        return AttentionMask(None, dense.astype("bool"), flash)
    if paddle.in_dynamic_mode() and not ((dense == 0) | (dense <= _LOWEST)).all():
        raise ValueError(
            "an attention mask of floats is added to the scores: its values have to be 0 or below -1e4. Pass "
            "integers or bool for a mask with 1 for the keys that are attended to"
        )
    return AttentionMask(None, dense > _LOWEST, flash)


@paddle.jit.not_to_static
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale query key^T) value over the keys that each query attends to, [batch, queries, heads, value_dim].

    A query without any key gives 0. Gradients flow to query, key, value and sinks.

    Args:
        query: [batch, queries, heads, dim]. The queries are at the last positions of the keys.
        key: [batch, keys, kv_heads, dim]; heads is a multiple of kv_heads.
        value: [batch, keys, kv_heads, value_dim].
        mask: which keys a query attends to.
        scale: of the scores.
        window: number of last positions, its own included, that a query attends to; None for all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2).
        sinks: [heads], the score of an additional key without a value (gpt-oss).
        dropout: of the weights of the values; 0 outside of training.

    Raises:
        ValueError: if shapes or types don't fit.
    """
    is_dynamic = paddle.in_dynamic_mode()
    if is_dynamic:
        _check_shapes(query, key, value, mask, window, sinks)
    batch, num_queries, num_keys = _get_size(query, 0), _get_size(query, 1), _get_size(key, 1)

    def make_dense() -> Tensor:
        if mask.dense is None:
            return make_dense_mask(num_queries, num_keys, mask.ends, window).unsqueeze(1)
        return mask.dense if window is None else mask.dense & make_window_mask(num_queries, num_keys, window)

    def make_bias() -> Tensor:
        bias = paddle.where(make_dense(), 0.0, paddle.finfo(paddle.float32).min).astype("float32")
        return bias.expand([batch, -1, -1, -1])

    if can_fuse(query, key, value):
        if dropout:
            log_once("attention with dropout uses Paddle's ops")
        elif mask.dense is None:
            return fused_attention(query, key, value, mask.ends, None, scale, window, soft_cap, sinks)
        else:
            bias = mask.derive(("bias", window), make_bias)
            return fused_attention(query, key, value, None, bias, scale, None, soft_cap, sinks)
    if is_dynamic and mask.flash and is_on_gpu(query):
        limits = find_flash_limits(query, key, value) | {
            "a dense mask": mask.dense is not None, "soft caps": soft_cap is not None, "sinks": sinks is not None,
            "dropout": dropout > 0,
        }  # fmt: skip
        unsupported = ", ".join(name for name, is_so in limits.items() if is_so)
        if not unsupported:
            rows = mask.derive(("rows", num_keys, window), lambda: make_row_indices(batch, num_keys, mask.ends, window))
            return flash_attention(query, key, value, rows, scale)
        log_once(f"attention with {unsupported} uses Paddle's ops in place of flash attention")
    if is_dynamic and mask.dense is None and num_queries == num_keys and query.place.is_cpu_place():
        blocks = mask.derive(
            ("blocks", num_keys, window), lambda: make_query_blocks(batch, num_keys, mask.ends, window)
        )
        if blocks:
            return attend_in_blocks(query, key, value, blocks, scale, soft_cap, sinks, dropout)
    dense = mask.derive(("dense", num_queries, num_keys, window), make_dense)
    return reference_attention(query, key, value, dense, scale, soft_cap, sinks, dropout)


def _get_size(tensor: Tensor, axis: int) -> Any:
    """A number, or a scalar tensor in a static graph."""
    return tensor.shape[axis] if paddle.in_dynamic_mode() else paddle.shape(tensor)[axis].astype("int32")


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, window: int | None, sinks: Tensor | None
) -> None:
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            "query, key and value have to be [batch, tokens, heads, head_dim]; got "
            f"{', '.join(str(list(tensor.shape)) for tensor in (query, key, value))}"
        )
    (batch, queries, heads, dim), (_, keys, kv_heads, _) = query.shape, key.shape
    if heads % kv_heads:
        raise ValueError(f"the query's heads have to be a multiple of the key's; got {heads} and {kv_heads}")
    if queries > keys:
        raise ValueError(f"queries are at the last positions of the keys; got {queries} queries and {keys} keys")
    if window is not None and window < 1:
        raise ValueError(f"a window has to be at least 1; got {window}")
    dense_shape = [] if mask.dense is None else [*mask.dense.shape[:2], queries, keys]
    expected = {
        "key": (key, [batch, keys, kv_heads, dim]),
        "value": (value, [batch, keys, kv_heads, value.shape[3]]),
        "ends": (mask.ends, [batch, keys]),
        "the mask": (mask.dense, dense_shape),
        "sinks": (sinks, [heads]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} has to be {shape}; got {list(tensor.shape)}")
