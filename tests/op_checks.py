"""Helpers for the tests of fused operators."""

from __future__ import annotations

import numpy as np
import pytest

from oarlock.environment.paddle_import import import_paddle
from oarlock.ops import library

import_paddle()
import paddle  # noqa: E402

built = pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing())


def draw_normal(*shape, seed=0):
    tensor = paddle.to_tensor(np.random.default_rng([seed, *shape]).normal(0, 1, shape).astype("float32"))
    tensor.stop_gradient = False
    return tensor


def check_same(fused, reference, inputs, rtol=1e-5):
    """Check that two functions have equal outputs, and equal gradients for non-uniform output gradients."""
    results = []
    for function in (fused, reference):
        outputs = function(*inputs)
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        gradients = [draw_normal(*output.shape, seed=7) for output in outputs]
        results.append([*outputs, *paddle.grad(outputs, inputs, gradients)])
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape
        most = np.abs(wanted.numpy()).max(initial=0)
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=rtol, atol=rtol * most)
