"""The fused norms compared with float64: values, gradients, dtypes, shapes, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import LLM
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EnvironmentProblem
from oarlock.ops import library, rms_norm, self_check

import_paddle()
import paddle  # noqa: E402

pytestmark = pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing())
EPSILON = 1e-5
ROUNDING = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}  # of a value near one


def compute_float64(x, scale, bias, grad_y):
    """float64 arrays -> y, and the gradients of x, scale, bias (for RMSNorm bias is None)."""
    centred = x - x.mean(-1, keepdims=True) if bias is not None else x
    invvar = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    normed, g = centred * invvar, grad_y * scale
    grad_x = invvar * (g - normed * (g * normed).mean(-1, keepdims=True))
    if bias is not None:
        grad_x -= invvar * g.mean(-1, keepdims=True)
    axes = tuple(range(x.ndim - 1))
    y = normed * scale + (bias if bias is not None else 0)
    return y, grad_x, (grad_y * normed).sum(axes), grad_y.sum(axes)


def tensors(shape, x_type="float32", scale_type="float32", seed=0):
    """x, residual, scale, bias, and gradients for y and the sum."""
    made = np.random.default_rng(seed)
    shapes = (shape, shape, shape[-1:], shape[-1:], shape, shape)
    types = (x_type, x_type, scale_type, scale_type, scale_type, x_type)
    values = [
        paddle.to_tensor(made.normal(0.3, 1, s).astype("float32")).astype(t) for s, t in zip(shapes, types, strict=True)
    ]
    for tensor in values:
        tensor.stop_gradient = False
    return values


def to_float64(tensor):
    return tensor.astype("float32").numpy().astype("float64")


def add_once_rounded(a, b):
    """a + b, rounded once (Paddle's CPU has no addition of half types)."""
    return (a.astype("float32") + b.astype("float32")).astype(a.dtype)


def close(found, wanted, dtype, scale=1.0):
    assert found.dtype == getattr(paddle, dtype)
    assert list(found.shape) == list(wanted.shape)
    np.testing.assert_allclose(to_float64(found), wanted, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype] * scale)


def check_all(shape, x_type, scale_type, seed=0):
    """Check values and gradients of the three operators."""
    x, residual, scale, bias, grad_y, grad_sum = tensors(shape, x_type, scale_type, seed)
    rows = max(1, int(np.prod(shape[:-1])))
    worst = max(ROUNDING[x_type], ROUNDING[scale_type])
    of_sums = rows**0.5 + worst / ROUNDING[scale_type]  # sums over rows of rounded terms

    y, invvar = rms_norm.fused_rms_norm(x, scale, EPSILON)
    grads = paddle.grad([y], [x, scale], [grad_y])
    wanted = compute_float64(to_float64(x), to_float64(scale), None, to_float64(grad_y))
    close(y, wanted[0], scale_type, 4)
    close(grads[0], wanted[1], x_type, 8)
    close(grads[1], wanted[2], scale_type, 8 * of_sums)
    close(invvar, 1 / np.sqrt((to_float64(x) ** 2).mean(-1) + EPSILON), "float32", 8)

    y, mean, invvar = rms_norm.fused_ln(x, scale, bias, EPSILON)
    grads = paddle.grad([y], [x, scale, bias], [grad_y])
    wanted = compute_float64(to_float64(x), to_float64(scale), to_float64(bias), to_float64(grad_y))
    sharp = float(invvar.max()) if rows and invvar.size else 1.0  # LayerNorm of nearly equal numbers magnifies rounding
    close(y, wanted[0], scale_type, 8 * max(1, sharp))
    close(grads[0], wanted[1], x_type, 16 * max(1, sharp) ** 2)
    close(grads[1], wanted[2], scale_type, 16 * of_sums * max(1, sharp))
    close(grads[2], wanted[3], scale_type, 8 * of_sums)
    close(mean, to_float64(x).mean(-1), "float32", 4)

    y, total, _ = rms_norm.fused_add_rms_norm(x, residual, scale, EPSILON)
    assert total.dtype == x.dtype
    np.testing.assert_array_equal(to_float64(total), to_float64(add_once_rounded(x, residual)))
    grads = paddle.grad([y, total], [x, residual, scale], [grad_y, grad_sum])
    wanted = compute_float64(to_float64(total), to_float64(scale), None, to_float64(grad_y))
    close(y, wanted[0], scale_type, 4)
    close(grads[0], wanted[1] + to_float64(grad_sum), x_type, 8)
    np.testing.assert_array_equal(to_float64(grads[0]), to_float64(grads[1]))
    close(grads[2], wanted[2], scale_type, 8 * of_sums)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_unused_outputs_have_no_gradient(used):
    x, residual, scale, *_ = tensors((3, 5))
    rms_norm.fused_add_rms_norm(x, residual, scale, EPSILON)[used].sum().backward()
    wanted = paddle.grad([rms_norm.reference_rms_norm(x + residual, scale, EPSILON).sum()], [x, scale])
    if used == 0:
        close(x.grad, to_float64(wanted[0]), "float32", 4)
        close(scale.grad, to_float64(wanted[1]), "float32", 4)
    else:  # the sum itself; 1/rms, which has no gradient
        assert (x.grad.numpy() == (used == 1)).all() and not scale.grad.numpy().any()


@pytest.mark.parametrize("scale_type", ROUNDING)
@pytest.mark.parametrize("x_type", ROUNDING)
def test_every_dtype(x_type, scale_type):
    check_all((3, 5, 67), x_type, scale_type)


@pytest.mark.parametrize("shape", [(9,), (1, 1), (7, 16), (2, 3, 4, 37), (100, 1003), (4, 8192), (2100, 48)])
def test_every_shape(shape):
    check_all(shape, "float32", "float32")


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), cols=st.integers(1, 300), x_type=st.sampled_from([*ROUNDING]), seed=st.integers(0, 99))
def test_any_rows_and_width(rows, cols, x_type, seed):
    check_all((rows, cols), x_type, "float32", seed)


def test_outputs_larger_than_the_caches():
    """From 16 MB on they are written with non-temporal stores."""
    x, _, scale, _, grad_y, _ = tensors((4100, 1024))
    y, _ = rms_norm.fused_rms_norm(x, scale, EPSILON)
    wanted = compute_float64(to_float64(x), to_float64(scale), None, to_float64(grad_y))
    for found, value in zip([y, *paddle.grad([y], [x], [grad_y])], wanted, strict=False):
        close(found, value, "float32", 8)


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    """The code for CPUs without AVX-512; it is chosen once per process."""
    code = """
import test_norms
test_norms.check_all((3, 5, 67), "float16", "float16")
test_norms.check_all((40, 1003), "bfloat16", "float32")
test_norms.test_outputs_larger_than_the_caches()
"""
    environment = {
        **os.environ,
        "OARLOCK_ISA": isa,
        "PYTHONPATH": f"{LLM}:{os.path.dirname(__file__)}:{LLM.parent}/tests",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_rounding_of_half_types():
    """Every float16 and bfloat16 value passes unchanged, including infinities, subnormal numbers and NaN."""
    bits = np.arange(65536, dtype=np.uint16)
    as_bfloat16 = paddle.to_tensor((bits.astype(np.uint32) << 16).view(np.float32)).astype("bfloat16")
    for x in (paddle.to_tensor(bits.view(np.float16)), as_bfloat16):
        for cols in (64, 1):  # vectorised, and one by one
            rows = x.reshape([-1, cols])
            nothing = paddle.zeros([*rows.shape], "float32").astype(x.dtype)
            _, total, _ = rms_norm.fused_add_rms_norm(rows, nothing, paddle.ones([cols]), EPSILON)
            np.testing.assert_array_equal(to_float64(total), to_float64(rows))


def test_rounding_to_half_types():
    """To nearest, ties to even, overflow to infinity: as in numpy (float16) and Paddle (bfloat16)."""
    numbers = np.random.default_rng(0).integers(0, 2**32, 1 << 15, dtype=np.uint32).view(np.float32)
    near = np.float32([65519, 65520, 2**-24, 2**-25, 1.5 * 2**-24, 2**-14, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8])
    numbers = np.concatenate([numbers[np.isfinite(numbers)], near, -near])
    with np.errstate(over="ignore"):
        wanted = {"float16": numbers.astype(np.float16).astype(np.float64)}
    wanted["bfloat16"] = to_float64(paddle.to_tensor(numbers).astype("bfloat16"))
    for dtype, values in wanted.items():
        for cols in (numbers.size, 1):  # vectorised, and one by one
            # With x = 0 and epsilon = 1, the gradient of x is that of y, rounded to x's dtype.
            x = paddle.zeros([1, cols]).astype(dtype)
            x.stop_gradient = False
            y, _ = rms_norm.fused_rms_norm(x, paddle.ones([cols]), 1.0)
            (found,) = paddle.grad([y], [x], [paddle.to_tensor(numbers[:cols]).reshape([1, cols])])
            np.testing.assert_array_equal(to_float64(found)[0], values[:cols])


def test_same_bits_for_any_number_of_threads():
    x, _, scale, _, grad_y, _ = tensors((3000, 96))
    results = []
    for threads in (1, 2, 3):
        paddle.base.core.set_num_threads(threads)
        y, _ = rms_norm.fused_rms_norm(x, scale, EPSILON)
        results.append([y, *paddle.grad([y], [x, scale], [grad_y])])
    paddle.base.core.set_num_threads(import_paddle())
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other, strict=True))


def test_non_contiguous_inputs():
    x, _, scale, bias, grad_y, _ = tensors((6, 40))
    turned, strided = x.transpose([1, 0]).contiguous().transpose([1, 0]), paddle.stack([scale, bias], axis=1)[:, 0]
    assert not turned.is_contiguous() and not strided.is_contiguous()
    plain, _ = rms_norm.fused_rms_norm(x, scale, EPSILON)
    y, _ = rms_norm.fused_rms_norm(turned, strided, EPSILON)
    assert (y == plain).all()
    turned_gradient = grad_y.transpose([1, 0]).contiguous().transpose([1, 0])
    for found, wanted in zip(
        paddle.grad([y], [x, scale], [turned_gradient]), paddle.grad([plain], [x, scale], [grad_y]), strict=True
    ):
        assert (found == wanted).all()


def test_norms_under_recomputation():
    from paddle.distributed.fleet.utils import recompute

    x, _, scale, _, grad_y, _ = tensors((5, 33))

    def block(values):
        return rms_norm.fused_rms_norm(rms_norm.fused_rms_norm(values, scale, EPSILON)[0], scale, EPSILON)[0]

    plain = paddle.grad([block(x)], [x, scale], [grad_y])
    y = recompute(block, x)
    y.backward(grad_y)
    assert (x.grad == plain[0]).all() and (scale.grad == plain[1]).all()


def test_refusals():
    x, residual, scale, bias, _, _ = tensors((4, 8))
    for call, words in (
        (lambda: rms_norm.fused_rms_norm(x, scale[:7], EPSILON), r"scale has to be .*\[8\]; got \[7\]"),
        (lambda: rms_norm.fused_rms_norm(x, paddle.ones([4, 8]), EPSILON), r"scale has to be .*got \[4, 8\]"),
        (lambda: rms_norm.fused_rms_norm(x.astype("int32"), scale, EPSILON), "x has to be float32, .*int32"),
        (lambda: rms_norm.fused_rms_norm(x, scale.astype("float64"), EPSILON), "scale has to be float32, .*float64"),
        (lambda: rms_norm.fused_rms_norm(paddle.zeros([4, 0]), paddle.zeros([0]), EPSILON), r"last axis.*\[4, 0\]"),
        (lambda: rms_norm.fused_ln(x, scale, bias.astype("float16"), EPSILON), "bias has to be of scale's type"),
        (lambda: rms_norm.fused_ln(x, scale, bias[:3], EPSILON), r"bias has to be .*\[8\]; got \[3\]"),
        (
            lambda: rms_norm.fused_add_rms_norm(x, residual[:2], scale, EPSILON),
            r"float32 \[2, 8\] beside float32 \[4, 8\]",
        ),
        (
            lambda: rms_norm.fused_add_rms_norm(x, residual.astype("float16"), scale, EPSILON),
            r"float16 \[4, 8\] beside float32",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_training_with_a_wrong_library_is_refused(monkeypatch):
    right = rms_norm.fused_rms_norm
    monkeypatch.setattr(self_check, "fused_rms_norm", lambda x, scale, epsilon: [right(x, scale, epsilon)[0] * 1.01])
    with pytest.raises(EnvironmentProblem, match="fused RMSNorm gives wrong results on this machine"):
        self_check.check_norms.__wrapped__()


@pytest.mark.parametrize("shape", [(2, 7, 33), (3, 640), (0, 8)])
def test_a_norm_that_also_returns_its_input(shape):
    """x has one gradient for both of its uses, also if only one of them is used."""
    x, _, scale, _, grad_y, grad_kept = tensors(shape)
    y, kept = rms_norm.fused_rms_norm_kept(x, scale, EPSILON)
    np.testing.assert_array_equal(kept.numpy(), x.numpy())
    np.testing.assert_array_equal(y.numpy(), rms_norm.fused_rms_norm(x, scale, EPSILON)[0].numpy())
    of_norm = paddle.grad([rms_norm.fused_rms_norm(x, scale, EPSILON)[0]], [x, scale], [grad_y])
    both = paddle.grad([y, kept], [x, scale], [grad_y, grad_kept], retain_graph=True)
    close(both[0], to_float64(of_norm[0]) + to_float64(grad_kept), "float32", 4)
    np.testing.assert_array_equal(both[1].numpy(), of_norm[1].numpy())
    for grads, wanted in (
        (paddle.grad([y], [x, scale], [grad_y], retain_graph=True), of_norm),
        (paddle.grad([kept], [x, scale], [grad_kept]), [grad_kept, paddle.zeros_like(scale)]),
    ):
        for found, right in zip(grads, wanted, strict=True):
            np.testing.assert_array_equal(found.numpy(), right.numpy())
