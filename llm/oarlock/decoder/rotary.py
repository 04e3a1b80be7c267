"""Rotary position embeddings (RoFormer, https://arxiv.org/abs/2104.09864) of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import paddle
from paddle.incubate.nn.functional import fused_rotary_position_embedding
from paddle.nn import functional

from oarlock.decoder.frequencies import compute_frequencies, get_original_length
from oarlock.families.architecture import Rope
from oarlock.ops.patch import can_fuse
from oarlock.ops.rotary import fused_rotary
from oarlock.typing import Tensor

_MAX_TABLES = 8
_MIN_POSITIONS = 256  # of a table


@paddle.jit.not_to_static
def rotate(query: Tensor, key: Tensor, rope: Rope, positions: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Rotate pairs of components by angles that grow with the position; components after rope.dim stay as they are.

    Args:
        query, key: [batch, tokens, heads, head_dim], of the same tokens; their numbers of heads may differ.
        positions: int64 [batch, tokens]. None: 0, 1, ... in every row.
        length: largest position + 1, or more (of a row with padding). A static graph takes it from the positions.

    Returns:
        Both, in their shape and type.
    """
    if rope.dim < query.shape[-1]:
        rotated = rotate(query[..., : rope.dim], key[..., : rope.dim], rope, positions, length)
        return tuple(paddle.concat([a, b[..., rope.dim :]], -1) for a, b in zip(rotated, (query, key), strict=True))
    if rope.interleaved:
        rotated = rotate(_deinterleave(query), _deinterleave(key), replace(rope, interleaved=False), positions, length)
        return tuple(x.reshape([0, 0, 0, 2, x.shape[-1] // 2]).transpose([0, 1, 2, 4, 3]).flatten(3) for x in rotated)
    if not paddle.in_dynamic_mode():
        return _rotate_in_graph(query, key, rope, positions)
    if positions is not None and _is_long(rope, length):  # the row is; padded or packed texts in it may not be
        cos, sin, positions = _join_tables(rope, positions)
    else:
        cos, sin = _get_table(rope, length)
    if can_fuse(query, key):
        return fused_rotary(query, key, cos, sin, positions)
    cos, sin = cos.astype(query.dtype), sin.astype(query.dtype)
    if positions is None:
        cos, sin = cos[: query.shape[1]], sin[: query.shape[1]]
    if query.place.is_gpu_place() and rope.dim % 4 == 0:  # its kernel reads pairs of each half
        return fused_rotary_position_embedding(
            query, key, None, sin=sin, cos=cos, position_ids=positions, use_neox_rotary_style=False
        )[:2]
    if positions is None:
        cos, sin = cos.unsqueeze([0, 2]), sin.unsqueeze([0, 2])
    else:
        cos, sin = (functional.embedding(positions, table).unsqueeze(2) for table in (cos, sin))
    return _apply_rotary(query, cos, sin), _apply_rotary(key, cos, sin)


def make_rotary_tables(rope: Rope, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the positions 0 to length - 1, float32 [length, dim], both halves alike.

    All layers share one table.
    """
    cos, sin = _get_table(rope, length)
    return cos[:length], sin[:length]


@dataclass(frozen=True)
class _Table:
    rope: Rope
    device: str
    is_long: bool
    length: int
    cos: Tensor
    sin: Tensor


_tables: tuple[_Table, ...] = ()  # the most recent ones


def _get_table(rope: Rope, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of at least `length` positions. A table that is too short is made twice as long."""
    global _tables
    identity = rope, paddle.get_device(), _is_long(rope, length)
    is_exact = rope.kind == "dynamic" and identity[2]  # every length has its own frequencies
    table = next((table for table in _tables if (table.rope, table.device, table.is_long) == identity), None)
    if table is None or table.length < length or (is_exact and table.length != length):
        rows = length if is_exact else max(_MIN_POSITIONS, 1 << (length - 1).bit_length())
        if length <= rope.max_positions:
            rows = min(rows, rope.max_positions)
        inverse, factor = compute_frequencies(rope, length)
        cos, sin = _compute_cos_and_sin(rope, paddle.arange(rows), paddle.to_tensor(inverse), factor)
        others = tuple(other for other in _tables if other is not table)
        table = _Table(*identity, rows, cos, sin)
        _tables = (table, *others[: _MAX_TABLES - 1])
    return table.cos, table.sin


def _join_tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cos, sin and each token's row in them, where texts of different lengths need different tables.

    A text begins wherever the position is 0.
    """
    array = positions.numpy()
    row = np.arange(len(array))[:, None]
    text = np.cumsum(array == 0, axis=1) + row * (array.shape[1] + 1)
    longest = np.zeros(text.max() + 1, np.int64)
    np.maximum.at(longest, text, array + 1)
    # Texts with the same frequencies share a table: longrope needs two tables, dynamic one for every length.
    lengths = np.maximum(longest[text], get_original_length(rope))
    if rope.kind == "longrope":
        lengths = np.where(lengths > get_original_length(rope), lengths.max(), lengths)
    table_lengths, table_of_token = np.unique(lengths, return_inverse=True)
    tables = [_get_table(rope, int(length)) for length in table_lengths]
    if len(tables) == 1:
        return *tables[0], positions
    starts = np.cumsum([0, *(len(cos) for cos, _ in tables[:-1])])
    cos, sin = (paddle.concat(parts) for parts in zip(*tables, strict=True))
    return cos, sin, positions + paddle.to_tensor(starts[table_of_token.reshape(array.shape)], place=positions.place)


def _is_long(rope: Rope, length: int) -> bool:
    """Whether the frequencies differ from those of short texts."""
    return rope.depends_on_length and length > get_original_length(rope)


def _compute_cos_and_sin(rope: Rope, positions: Tensor, inverse: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """[...] -> float32 [..., dim]."""
    with paddle.no_grad(), paddle.amp.auto_cast(False):
        positions = positions.astype("float32")
        if rope.kind == "linear":  # PaddleNLP divides positions, not frequencies, which rounds differently
            positions = positions / rope.scaling["factor"]
            inverse = paddle.assign(compute_frequencies(replace(rope, kind="default"), 1)[0])
        angles = positions.unsqueeze(-1) * inverse
        angles = paddle.concat([angles, angles], -1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def _rotate_in_graph(query: Tensor, key: Tensor, rope: Rope, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """rotate() in a static graph, which computes the angles, so that texts may have any length."""
    if positions is None:
        positions = paddle.arange(paddle.shape(query)[1], dtype="int64").unsqueeze(0)
    length, original = positions.max(axis=1, keepdim=True).unsqueeze(-1) + 1, get_original_length(rope)  # of each row
    short, factor = compute_frequencies(rope, original)
    inverse = paddle.assign(short)
    if rope.kind == "longrope":
        long, _ = compute_frequencies(rope, original + 1)
        inverse = paddle.where(length > original, paddle.assign(long), inverse)
    elif rope.kind == "dynamic":
        stretched = paddle.clip(rope.scaling["factor"] * (length.astype("float32") / original - 1) + 1, min=1.0)
        inverse = inverse * stretched ** paddle.assign(np.arange(0, -rope.dim, -2, np.float32) / (rope.dim - 2))
    cos, sin = _compute_cos_and_sin(rope, positions, inverse, factor)
    cos, sin = cos.unsqueeze(2).astype(query.dtype), sin.unsqueeze(2).astype(query.dtype)
    return _apply_rotary(query, cos, sin), _apply_rotary(key, cos, sin)


def _apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, axis=-1)
    return x * cos + paddle.concat([-second, first], axis=-1) * sin


def _deinterleave(x: Tensor) -> Tensor:
    """[a0, b0, a1, b1, ...] -> [a0, a1, ..., b0, b1, ...] on the last axis."""
    return x.reshape([0, 0, 0, x.shape[-1] // 2, 2]).transpose([0, 1, 2, 4, 3]).flatten(3)
