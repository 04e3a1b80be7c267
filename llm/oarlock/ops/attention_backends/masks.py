"""Which keys a query attends to: as a dense mask, as flashmask's rows, and as blocks of packed rows.

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
class Block:
    """Queries `start` to before `stop` of a row, which attend to keys from `first_key` to before `stop` at most.

    Attributes:
        row: its index in the batch.
        seen: bool [1, 1, queries, keys], true if a query attends to a key.
    """

    row: int
    first_key: int
    start: int
    stop: int
    seen: Tensor


def make_dense_mask(num_queries: Any, num_keys: Any, ends: Tensor | None = None, window: int | None = None) -> Tensor:
    """Make a mask, bool [batch or 1, queries, keys], that is true if a query attends to a key.

    Args:
        num_queries, num_keys: numbers, or scalar tensors in a static graph. The queries are at the last positions.
        ends, window: see the module.
    """
    seeing = paddle.arange(num_keys - num_queries, num_keys, dtype="int32").unsqueeze(1)
    seen = (paddle.arange(num_keys, dtype="int32") <= seeing).unsqueeze(0)
    if window is not None:
        seen = seen & make_window_mask(num_queries, num_keys, window)
    return seen if ends is None else seen & (seeing < ends.unsqueeze(1))


def make_window_mask(num_queries: Any, num_keys: Any, window: int) -> Tensor:
    """Make a mask, bool [1, queries, keys], that is false for keys before a query's window. Keys after it are seen."""
    seeing = paddle.arange(num_keys - num_queries, num_keys, dtype="int32").unsqueeze(1)
    return (paddle.arange(num_keys, dtype="int32") > seeing - window).unsqueeze(0)


def make_row_indices(batch: int, num_keys: int, ends: Tensor | None, window: int | None) -> Tensor | None:
    """Make flashmask's startend_row_indices of a causal mask: for each key the first query that does not attend to it.

    Returns:
        int32 [batch, 1, keys, 1], for as many queries as keys, or None if causality is all.
    """
    rows = ends
    if window is not None and window < num_keys:
        leaving = paddle.arange(window, window + num_keys, dtype="int32").clip(max=num_keys)
        rows = leaving.expand([batch, num_keys]) if ends is None else paddle.minimum(ends, leaving)
    return None if rows is None else rows.reshape([batch, 1, num_keys, 1])


def make_query_blocks(batch: int, num_keys: int, ends: Tensor | None, window: int | None) -> list[Block]:
    """Split rows with as many queries as keys into blocks, whose scores need less memory than those of full rows.

    Returns:
        The blocks of all rows in order, or none if that would be one for each row.
    """
    places = None if ends is None else ends.numpy()
    step = num_keys if window is None else max(window, _BLOCK)
    ranges = [
        (row, first, start, min(start + step, last))
        for row in range(batch)
        for first, last in ([(0, num_keys)] if places is None else split_row(places[row]))
        for start in range(first, last, step)
    ]
    blocks = []
    for row, first, start, stop in ranges if len(ranges) > batch else ():
        first_key = first if window is None else max(first, start - window + 1)
        of_keys = None if places is None else paddle.to_tensor(places[row : row + 1, first_key:stop] - first_key)
        seen = make_dense_mask(stop - start, stop - first_key, of_keys, window).unsqueeze(1)
        blocks.append(Block(row, first_key, start, stop, seen))
    return blocks


def split_row(ends: np.ndarray) -> list[tuple[int, int]]:
    """Split a row into blocks [start, stop) across which no token attends. Short ones are joined.

    Args:
        ends: [tokens], see the module.
    """
    stops = np.flatnonzero(np.maximum.accumulate(ends) <= np.arange(1, len(ends) + 1)) + 1
    pieces = [(0, 0)]
    for stop in stops.tolist():
        first, last = pieces[-1]
        if stop - first <= _BLOCK:
            pieces[-1] = (first, stop)
        else:
            pieces.append((last, stop))
    return [piece for piece in pieces if piece[1] > piece[0]]
