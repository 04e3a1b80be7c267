"""Tensors that are the same on every rank of a scenario, and NumPy's results for them."""

from __future__ import annotations

import itertools

import numpy as np
from cpu_ranks import RANKS

KINDS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (1,), (7,), (3, 5), (64, 17))
# Through the large path, in more than one round for the wider kinds.
CASES = [
    *itertools.product(KINDS, SHAPES),
    *itertools.product(("float32", "bfloat16", "int8"), ((129, 1027), (700_001,))),
]


def make(rng, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a dtype, with the ranks along the first axis; bfloat16 as exactly representable float32."""
    shape = (RANKS, *shape)
    if kind == "bool":
        return np.resize(rng.integers(0, 2, 10_007).astype(bool), shape)
    if "int" in kind:
        return np.resize(rng.integers(0, 5, 10_007).astype(kind), shape)
    values = np.resize(rng.standard_normal(10_007, dtype=np.float32), shape)
    if kind == "complex64":
        return (values + 1j * values[::-1]).astype(kind)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if kind == "bfloat16" else values.astype(kind)


def tensor_of(values: np.ndarray, kind: str):
    import paddle

    tensor = paddle.to_tensor(values)
    return tensor.astype(kind) if kind == "bfloat16" else tensor


def have_same_bits(tensor, expected: np.ndarray, kind: str, what: str) -> None:
    """Whether the bits are equal (bfloat16 is widened, which is exact)."""
    import paddle

    found = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype, (what, kind, found.shape, expected.shape)
    assert found.tobytes() == expected.tobytes(), (what, kind, found, expected)


def reduce_in_rank_order(values: np.ndarray, operation: str, kind: str) -> np.ndarray:
    """Reduce in rank order; half types in float32 with a single rounding by Paddle."""
    combine = {"MAX": np.maximum, "MIN": np.minimum, "PROD": np.multiply}.get(operation, np.add)
    parts = values.astype(np.float32) if kind in ("float16", "bfloat16") else values
    total = parts[0].copy()
    for part in parts[1:]:
        total = np.asarray(combine(total, part), total.dtype)
    if operation == "AVG":
        total = np.asarray(total // RANKS if "int" in kind else total / np.float32(RANKS), total.dtype)
    if kind in ("float16", "bfloat16"):
        import paddle

        return paddle.to_tensor(total).astype(kind).astype("float32").numpy().astype(values.dtype)
    return total
