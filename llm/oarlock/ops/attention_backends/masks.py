"""Attention masks in the forms that the backends need: dense, as flashmask's row indices, and as blocks of queries.

`ends`, int32 [batch, keys], is the compact form of a causal mask: query p attends to the keys up to its own position
whose end is after p. Keys of a packed example have the position at which the example ends (PaddleNLP's
attn_mask_startend_row_indices), padding has 0, and all other keys have the number of keys. With a `window`, query p
attends to the keys after p - window only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from oarlock.typing import Tensor

_BLOCK = 128  # tokens; for smaller blocks, calls of small operations cost more than masked scores


@dataclass(frozen=True)
class QueryBlock:
    """Queries [start, stop) of a row, which attend to keys [first_key, stop) only.

    Attributes:
        row: its index in the batch.
        mask: bool [1, 1, queries, keys], true if a query attends to a key.
    """

    row: int
    first_key: int
    start: int
    stop: int
    mask: Tensor


def make_dense_mask(num_queries: Any, num_keys: Any, ends: Tensor | None = None, window: int | None = None) -> Tensor:
    """Make a mask, bool [batch or 1, queries, keys], that is true if a query attends to a key.

    Args:
        num_queries, num_keys: numbers, or scalar tensors in a static graph. The queries are at the last positions.
        ends, window: see the module.
    """
    query_positions = paddle.arange(num_keys - num_queries, num_keys, dtype="int32").unsqueeze(1)
    mask = (paddle.arange(num_keys, dtype="int32") <= query_positions).unsqueeze(0)
    if window is not None:
        mask = mask & make_window_mask(num_queries, num_keys, window)
    return mask if ends is None else mask & (query_positions < ends.unsqueeze(1))


def make_window_mask(num_queries: Any, num_keys: Any, window: int) -> Tensor:
    """Make a mask, bool [1, queries, keys], that is false for keys before a query's window only."""
    query_positions = paddle.arange(num_keys - num_queries, num_keys, dtype="int32").unsqueeze(1)
    return (paddle.arange(num_keys, dtype="int32") > query_positions - window).unsqueeze(0)


def make_row_indices(batch: int, num_keys: int, ends: Tensor | None, window: int | None) -> Tensor | None:
    """Make flashmask's startend_row_indices of a causal mask: for each key the first query that does not attend to it.

    Returns:
        int32 [batch, 1, keys, 1], for as many queries as keys, or None if the mask is plainly causal.
    """
    rows = ends
    if window is not None and window < num_keys:
        window_ends = paddle.arange(window, window + num_keys, dtype="int32").clip(max=num_keys)
        rows = window_ends.expand([batch, num_keys]) if ends is None else paddle.minimum(ends, window_ends)
    return None if rows is None else rows.reshape([batch, 1, num_keys, 1])


def make_query_blocks(batch: int, num_keys: int, ends: Tensor | None, window: int | None) -> list[QueryBlock]:
    """Split rows with as many queries as keys into blocks, whose scores need less memory than those of full rows.

    Returns:
        The blocks of all rows in order, or none if there is only one for each row.
    """
    row_ends = None if ends is None else ends.numpy()
    step = num_keys if window is None else max(window, _BLOCK)
    ranges = [
        (row, first, start, min(start + step, last))
        for row in range(batch)
        for first, last in ([(0, num_keys)] if row_ends is None else split_row(row_ends[row]))
        for start in range(first, last, step)
    ]
    blocks = []
    for row, first, start, stop in ranges if len(ranges) > batch else ():
        first_key = first if window is None else max(first, start - window + 1)
        key_ends = None if row_ends is None else paddle.to_tensor(row_ends[row : row + 1, first_key:stop] - first_key)
        mask = make_dense_mask(stop - start, stop - first_key, key_ends, window).unsqueeze(1)
        blocks.append(QueryBlock(row, first_key, start, stop, mask))
    return blocks


def split_row(ends: np.ndarray) -> list[tuple[int, int]]:
    """Split a row into blocks [start, stop) across which no token attends. Short ones are merged.

    Args:
        ends: [tokens], see the module.
    """
    stops = np.flatnonzero(np.maximum.accumulate(ends) <= np.arange(1, len(ends) + 1)) + 1
    blocks = [(0, 0)]
    for stop in stops.tolist():
        first, last = blocks[-1]
        if stop - first <= _BLOCK:
            blocks[-1] = (first, stop)
        else:
            blocks.append((last, stop))
    return [block for block in blocks if block[1] > block[0]]
