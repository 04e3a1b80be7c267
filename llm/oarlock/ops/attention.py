"""Causal attention on a CPU in tiles, whose memory grows with the tokens and not their square (custom_ops/attention).

A mask has one of three forms, of which the first two cost nothing to speak of:

- none: query i of a row sees the keys up to its own place, i + keys - queries;
- ends, int32 [batch, keys]: it sees those of them whose end is beyond its place. Packed examples have the place at
  which they end (PaddleNLP's attn_mask_startend_row_indices), padding has 0, text without either the number of keys;
- bias, float32 [batch, 1 or heads, queries, keys]: added to the scores, nothing else being hidden.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import paddle

from oarlock.environment.console import log_once
from oarlock.ops import library
from oarlock.ops.patch import Function, fits

Tensor = Any


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(query key^T / sqrt(head_dim) + mask) value, [batch, queries, heads, head_dim], all float32.

    Tiles of which nothing is seen are left out. A query that sees nothing gives 0 (in Paddle's ops, the mean of all
    values). Gradients flow to query, key and value.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, key heads, head_dim]; heads is a multiple of key heads.
        ends, bias: see above.

    Raises:
        ValueError: when shapes or types do not fit.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    return library.run("oarlock_attention", query, key, value, ends, bias, scale, bias is None)[0]


def reference_attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """fused_attention in Paddle's ops."""
    key, value = (_repeated(tensor, query.shape[2] // tensor.shape[2]) for tensor in (key, value))
    scores = paddle.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    seen = dense_mask(ends, query.shape[1]).unsqueeze(1)
    weights = paddle.nn.functional.softmax(paddle.where(seen, scores, paddle.full_like(scores, -1e30)))
    return paddle.einsum("bhij,bjhd->bihd", weights, value)


def dense_mask(ends: Tensor, num_queries: int | None = None) -> Tensor:
    """bool [batch, queries, keys], true where a query (row) sees a key (column).

    Args:
        ends: [batch, keys], see above.
        num_queries: the last of the keys' places; None for all.
    """
    places = paddle.arange(ends.shape[1], dtype=ends.dtype)
    seeing = places if num_queries is None else places[ends.shape[1] - num_queries :]
    return (places.unsqueeze([0, 1]) <= seeing.unsqueeze([0, 2])) & (seeing.unsqueeze([0, 2]) < ends.unsqueeze(1))


def takes_ends(function: Function) -> bool:
    """Whether a model's attn_func is this module's, which keeps packed examples apart when it is given ends."""
    return getattr(getattr(function, "func", function), _MARK, False)


_MARK = "oarlock_takes_ends"


def replace_attention(original: Function) -> Function:
    """PaddleNLP's scaled_dot_product_attention, whose arguments differ a little from family to family."""
    signature = inspect.signature(original)

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        named = signature.bind(*args, **kwargs)
        named.apply_defaults()
        given = named.arguments
        query, key, value = (given[f"{name}_states"] for name in ("query", "key", "value"))
        mask, ends = given["attention_mask"], given.get("attn_mask_startend_row_indices")
        if ends is None and mask is not None and mask.ndim == 2:  # of replace_mask
            mask, ends = None, mask
        if ends is not None and ends.ndim == 3 and ends.shape[1] == 1:
            ends = ends.squeeze(1)
        reason = _refusal(given, ends)
        if reason or not fits(query, key, value):
            if reason:
                log_once(f"attention with {reason} goes through Paddle's own ops")
            groups = query.shape[2] // key.shape[2]
            given["key_states"], given["value_states"] = (_repeated(tensor, groups) for tensor in (key, value))
            if ends is not None and ends.ndim == 2:
                seen = dense_mask(ends, query.shape[1]).unsqueeze(1)
                given["attention_mask"] = paddle.where(seen, 0.0, paddle.finfo(query.dtype).min).astype(query.dtype)
                if "attn_mask_startend_row_indices" in given:
                    given["attn_mask_startend_row_indices"] = None
            return original(*named.args, **named.kwargs)
        batch, length = query.shape[:2]
        bias = None if mask is None else mask.reshape([batch, 1, length, key.shape[1]])
        output = fused_attention(query, key, value, ends, bias)
        return output.reshape([batch * length, -1] if given["sequence_parallel"] else [batch, length, -1])

    setattr(scaled_dot_product_attention, _MARK, True)
    return scaled_dot_product_attention


def _refusal(given: dict[str, Any], ends: Tensor | None) -> str:
    """What of a call the operator does not do; "" where it does all."""
    dropout = given.get("attn_dropout_prob", getattr(given["config"], "attention_dropout", 0))
    found = {
        "a static graph": not paddle.in_dynamic_mode(),
        "its weights asked for": given["output_attentions"],
        "ALiBi": given.get("alibi") is not None,
        "dropout": dropout and given.get("training", given.get("trainer_mode", False)),
        "values of another size": given["value_states"].shape != given["key_states"].shape,
        "several GPUs to a row": given.get("reshard_layer") is not None
        or getattr(given["config"], "context_parallel_degree", 1) > 1,
        "ends of a form of its own": ends is not None and ends.ndim != 2,
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def _repeated(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, axis=2)


def replace_repeat_kv(original: Function) -> Function:
    """Left to _attention, which repeats heads only where it has to."""

    def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
        return hidden_states if paddle.in_dynamic_mode() else original(hidden_states, n_rep)

    return repeat_kv


def replace_mask(original: Function) -> Function:
    """_prepare_decoder_attention_mask, with ends in the place of a dense mask that says no more."""

    def prepare(attention_mask: Tensor | None, input_shape: Any, past_key_values_length: int, dtype: Any) -> Tensor:
        served = paddle.in_dynamic_mode() and paddle.get_device() == "cpu" and dtype == paddle.float32
        if not served or (attention_mask is not None and attention_mask.ndim != 2):
            return original(attention_mask, input_shape, past_key_values_length, dtype)
        batch, length = input_shape
        ends = paddle.full([batch, length + past_key_values_length], length + past_key_values_length, "int32")
        return ends if attention_mask is None else ends * attention_mask.astype("bool").astype("int32")

    return staticmethod(prepare)


def replace_is_causal_mask(original: Function) -> Function:
    """Whether a mask may be dropped."""

    def is_casual_mask(attention_mask: Tensor) -> bool:
        return attention_mask.ndim > 2 and original(attention_mask)

    return is_casual_mask
