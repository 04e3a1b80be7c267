"""Causal attention on a CPU in tiles, with memory linear in the number of tokens (custom_ops/attention).

A mask has one of three forms. The first two cost almost nothing.

- none: query i of a row attends to the keys up to its own position, i + keys - queries.
- ends, int32 [batch, keys]: of those, it attends to the keys whose end is after its position. Keys of a packed example
  have the position at which the example ends (PaddleNLP's attn_mask_startend_row_indices), padding has 0, and all
  other keys have the number of keys.
- bias, float32 [batch, 1 or heads, queries, keys]: added to the attention scores. Nothing else is masked.
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

    Tiles that are masked completely are skipped. A query without any key gives 0 (with Paddle's ops, the mean of all
    values). Gradients flow to query, key and value.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, key heads, head_dim]; heads is a multiple of key heads.
        ends, bias: see the module.

    Raises:
        ValueError: if shapes or types don't fit.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    return library.run("oarlock_attention", query, key, value, ends, bias, scale, bias is None)[0]


def reference_attention(query: Tensor, key: Tensor, value: Tensor, ends: Tensor) -> Tensor:
    """Compute fused_attention in Paddle's ops."""
    key, value = (_repeated(tensor, query.shape[2] // tensor.shape[2]) for tensor in (key, value))
    scores = paddle.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(query.shape[-1])
    seen = dense_mask(ends, query.shape[1]).unsqueeze(1)
    weights = paddle.nn.functional.softmax(paddle.where(seen, scores, paddle.full_like(scores, -1e30)))
    return paddle.einsum("bhij,bjhd->bihd", weights, value)


def dense_mask(ends: Tensor, num_queries: int | None = None) -> Tensor:
    """Make a mask, bool [batch, queries, keys], that is true if a query attends to a key.

    Args:
        ends: [batch, keys], see the module.
        num_queries: the queries are at the last positions of the keys. None: there are as many as keys.
    """
    places = paddle.arange(ends.shape[1], dtype=ends.dtype)
    seeing = places if num_queries is None else places[ends.shape[1] - num_queries :]
    return (places.unsqueeze([0, 1]) <= seeing.unsqueeze([0, 2])) & (seeing.unsqueeze([0, 2]) < ends.unsqueeze(1))


def takes_ends(function: Function) -> bool:
    """Whether a model's attn_func is the fused attention, which separates packed examples if it is given `ends`."""
    return getattr(getattr(function, "func", function), _MARK, False)


_MARK = "oarlock_takes_ends"


def replace_attention(original: Function) -> Function:
    """Replace PaddleNLP's scaled_dot_product_attention, whose arguments differ between families."""
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
                log_once(f"attention with {reason} uses Paddle's ops")
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
    """Name the features of a call that the operator lacks, or return ""."""
    dropout = given.get("attn_dropout_prob", getattr(given["config"], "attention_dropout", 0))
    found = {
        "a static graph": not paddle.in_dynamic_mode(),
        "attention weights as output": given["output_attentions"],
        "ALiBi": given.get("alibi") is not None,
        "dropout": dropout and given.get("training", given.get("trainer_mode", False)),
        "values of another size than the keys": given["value_states"].shape != given["key_states"].shape,
        "context parallelism": given.get("reshard_layer") is not None
        or getattr(given["config"], "context_parallel_degree", 1) > 1,
        "a mask of ends in another form": ends is not None and ends.ndim != 2,
    }
    return ", ".join(name for name, is_so in found.items() if is_so)


def _repeated(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, axis=2)


def replace_repeat_kv(original: Function) -> Function:
    """Skip repeating: the replaced attention repeats heads only if it must."""

    def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
        return hidden_states if paddle.in_dynamic_mode() else original(hidden_states, n_rep)

    return repeat_kv


def replace_mask(original: Function) -> Function:
    """Make _prepare_decoder_attention_mask return ends in place of a dense mask with the same content."""

    def prepare(attention_mask: Tensor | None, input_shape: Any, past_key_values_length: int, dtype: Any) -> Tensor:
        served = paddle.in_dynamic_mode() and paddle.get_device() == "cpu" and dtype == paddle.float32
        if not served or (attention_mask is not None and attention_mask.ndim != 2):
            return original(attention_mask, input_shape, past_key_values_length, dtype)
        batch, length = input_shape
        ends = paddle.full([batch, length + past_key_values_length], length + past_key_values_length, "int32")
        return ends if attention_mask is None else ends * attention_mask.astype("bool").astype("int32")

    return staticmethod(prepare)


def replace_is_causal_mask(original: Function) -> Function:
    """Make is_casual_mask accept ends, which are two-dimensional and never dropped."""

    def is_casual_mask(attention_mask: Tensor) -> bool:
        return attention_mask.ndim > 2 and original(attention_mask)

    return is_casual_mask
