"""Weights in 4 bits: the published tables, blocks, 8-bit scales, memory, and the product with its gradient."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import paddle
import pytest

from oarlock.peft.qlora import block_axis
from oarlock.peft.quantization import (
    NF4,
    TABLES,
    Quantization,
    QuantizedMatmul,
    QuantizedWeight,
    make_dynamic_table,
)


def round_to_nearest(weight: np.ndarray, axis: int, table: np.ndarray, block: int) -> np.ndarray:
    """Quantize and dequantize one block after another, with float32 scales."""
    rows = weight.T if axis == 0 else weight
    found = np.zeros_like(rows)
    for i, row in enumerate(rows):
        for j in range(0, len(row), block):
            part = row[j : j + block]
            scale = np.abs(part).max() or 1.0
            found[i, j : j + block] = table[np.abs(part[:, None] / scale - table).argmin(axis=1)] * scale
    return found.T if axis == 0 else found


def test_nf4_follows_the_published_construction():
    """Appendix E: 8 quantiles below zero, zero, 7 above, of a normal distribution cut at 0.9677083, scaled to 1."""
    quantile = NormalDist().inv_cdf
    below = [quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    values = np.sort([*(-v for v in below), 0.0, *above])
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-7)


def test_fp4_and_the_8_bit_table_are_symmetric_and_complete():
    assert sorted(TABLES["fp4"]) == sorted(-value for value in TABLES["fp4"]) and max(TABLES["fp4"]) == 1.0
    table = make_dynamic_table()
    assert len(set(table.tolist())) == 256 and table[-1] == 1.0 and 0.0 in table
    assert np.diff(table).max() < 0.02  # no hole: a hundredth of the range


@pytest.mark.parametrize("algorithm", ["nf4", "fp4"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(200, 131), (64, 64), (7, 1)])
def test_every_weight_is_rounded_to_the_nearest_value(algorithm, axis, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight[: shape[0] // 3] = 0.0  # blocks of zeros have no scale
    stored = QuantizedWeight(paddle.to_tensor(weight), axis, Quantization(algorithm, 64, double=False))
    np.testing.assert_array_equal(
        stored.value().numpy(), round_to_nearest(weight, axis, np.array(TABLES[algorithm], np.float32), 64)
    )


def test_8_bit_scales_are_smaller_and_accurate():
    weight = np.random.default_rng(1).standard_normal((4096, 64)).astype(np.float32)
    single = QuantizedWeight(paddle.to_tensor(weight), 0, Quantization(double=False))
    double = QuantizedWeight(paddle.to_tensor(weight), 0, Quantization())
    assert single.num_bytes * 8 / weight.size == 4.5  # 32 / 64 for the scales
    assert double.num_bytes * 8 / weight.size == pytest.approx(4 + 8 / 64, abs=0.02)
    errors = [np.abs(stored.value().numpy() - weight).mean() for stored in (single, double)]
    assert errors[1] < 1.01 * errors[0] < 0.09  # of a standard deviation


@pytest.mark.parametrize("name", ["llama.layers.0.self_attn.o_proj.weight", "llama.layers.0.mlp.gate_proj.weight"])
def test_a_slice_is_quantized_as_in_the_full_tensor(name):
    """Tensor parallelism splits tensors between blocks, never inside one."""
    axis = block_axis(name)
    assert axis == (1 if "o_proj" in name else 0)
    weight = np.random.default_rng(2).standard_normal((96, 160)).astype(np.float32)
    how = Quantization()
    whole = how.round_trip(weight, axis)
    halves = [how.round_trip(half, axis) for half in np.split(weight, 2, axis=1 - axis)]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1 - axis), whole)


def test_the_product_and_its_gradient():
    weight = np.random.default_rng(3).standard_normal((48, 40)).astype(np.float32)
    stored = QuantizedWeight(paddle.to_tensor(weight), 0, Quantization())
    results = []
    for product in (lambda x: QuantizedMatmul.apply(x, stored), lambda x: paddle.matmul(x, stored.value())):
        x = paddle.to_tensor(np.random.default_rng(4).standard_normal((2, 5, 48)).astype(np.float32))
        x.stop_gradient = False
        y = product(x)
        (y * y).sum().backward()
        results.append((y.numpy(), x.grad.numpy()))
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
