"""The fused attention beside float64: values, gradients, masks, shapes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_attention import KINDS, exact_attention, make_ends, make_seen
from helpers import LLM
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EnvironmentProblem
from oarlock.ops import library, self_check

import_paddle()
import paddle  # noqa: E402

from oarlock.ops.attention_backends.fused import fused_attention  # noqa: E402
from oarlock.ops.attention_backends.reference import reference_attention  # noqa: E402

pytestmark = pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing())
LOWEST = np.finfo(np.float32).min
MASKS = (*KINDS, "dense", "dense of each head")


def made_mask(random, kind, batch, queries, keys, heads):
    """ends, bias, and what is seen."""
    if not kind.startswith("dense"):
        ends = None if kind == "causal" else make_ends(random, kind, batch, keys)
        return ends, None, make_seen(queries, keys, ends)
    shape = (batch, heads if kind.endswith("head") else 1, queries, keys)
    bias = random.normal(0, 1, shape).astype(np.float32)
    bias[random.random(shape) < 0.3] = LOWEST
    bias[..., : keys // 2, keys // 2 :] = LOWEST  # tiles of it
    bias[..., keys // 2 :, : keys // 2] = 0
    return None, bias, bias > -1e30


def check(
    batch, queries, keys, heads, groups, dim, mask, seed=0, *, value_dim=None, window=None, soft_cap=None,
    has_sinks=False,
):  # fmt: skip
    random = np.random.default_rng(seed)
    value_dim = value_dim or dim
    shapes = (queries, heads * groups, dim), (keys, heads, dim), (keys, heads, value_dim)
    shapes = [(batch, *shape) for shape in (*shapes, (queries, heads * groups, value_dim))]
    arrays = [random.normal(0, 1, shape).astype(np.float32) for shape in shapes]
    ends, bias, seen = made_mask(random, mask, batch, queries, keys, heads * groups)
    sinks = random.normal(0, 1, heads * groups).astype(np.float32) if has_sinks else None
    of_inputs = [*arrays[:3], *([sinks] if has_sinks else [])]
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in of_inputs]
    given_ends, given_bias = (None if array is None else paddle.to_tensor(array) for array in (ends, bias))
    features = {"window": window, "soft_cap": soft_cap, "sinks": tensors[3] if has_sinks else None}
    output = fused_attention(*tensors[:3], given_ends, given_bias, **features)
    found = [output, *paddle.grad([output], tensors, [paddle.to_tensor(arrays[3])])]
    expected = exact_attention(
        *arrays, seen & make_seen(queries, keys, window=window) if window else seen, dim**-0.5,
        bias=0 if bias is None else bias, soft_cap=soft_cap, sinks=sinks,
    )  # fmt: skip
    for tensor, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("mask", MASKS)
def test_several_tiles_and_blocks(mask):
    check(2, 331, 331, 2, 2, 40, mask)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256, 1, 33])
def test_head_sizes(dim):
    check(1, 70, 130, 1, 2, dim, "left padding")


@pytest.mark.parametrize(("heads", "groups", "length"), [(1, 1, 700), (1, 4, 700), (3, 1, 540), (20, 1, 270)])
def test_few_and_many_heads(heads, groups, length):
    """Few: the backward splits keys, and adds the queries' gradients of the parts."""
    check(1, length, length, heads, groups, 16, "packed")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 150), st.integers(1, 150), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 50), st.sampled_from(MASKS), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, queries, keys, heads, groups, dim, mask, seed):
    check(batch, queries, keys, heads, groups, dim, mask, seed)


def test_one_query_after_a_cache():
    for mask in ("causal", "left padding", "dense"):
        check(3, 1, 200, 2, 2, 64, mask)
    check(3, 1, 200, 2, 2, 64, "left padding", window=30, soft_cap=2.0, has_sinks=True)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 150), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(KINDS), st.integers(1, 160), st.sampled_from([None, 0.5, 4.0]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_window(queries, keys, groups, dim, value_dim, mask, window, soft_cap, has_sinks, seed):
    features = {"window": window, "soft_cap": soft_cap, "has_sinks": has_sinks}
    check(2, queries, keys, 2, groups, dim, mask, seed, value_dim=value_dim, **features)


def test_tiles_outside_the_window_are_not_computed():
    """NaN in them would spread: weights of 0 times NaN are NaN."""
    paddle.seed(0)
    tensors = [paddle.randn([1, 8192, heads, 16]) for heads in (2, 1, 1)]
    grad, marked = paddle.randn([1, 8192, 2, 16]), slice(4096, 4160)
    tensors[2][:, marked] = grad[:, marked] = float("nan")
    for tensor in tensors:
        tensor.stop_gradient = False
    output = fused_attention(*tensors, window=256)
    grads = paddle.grad([output], tensors, [grad])
    hidden = paddle.isnan(output).any(axis=[0, 2, 3])
    assert hidden[4160:4416].all() and not hidden[:4096].any() and not hidden[4416 + 64 :].any()
    for found in grads:  # of tokens that see a marked one or are seen by it, in the same tiles
        hidden = paddle.isnan(found).any(axis=[0, 2, 3])
        assert hidden.any() and not hidden[: 4096 - 320].any() and not hidden[4416 + 320 :].any()


@pytest.mark.parametrize("soft_cap", [0.01, 1.0, 50.0])
def test_soft_caps_of_small_and_large_scores(soft_cap):
    values = np.concatenate([-np.logspace(-6, 3, 200), np.logspace(-6, 3, 200)]).astype(np.float32)
    query, key = np.ones((1, 1, 1, 1), np.float32), values.reshape(1, -1, 1, 1)
    value = np.eye(400, dtype=np.float32).reshape(1, 400, 1, 400)
    found = fused_attention(*map(paddle.to_tensor, (query, key, value)), scale=1.0, soft_cap=soft_cap).numpy()
    wanted = np.exp(soft_cap * np.tanh(values.astype(np.float64) / soft_cap))
    np.testing.assert_allclose(found.ravel(), wanted / wanted.sum(), rtol=5e-5, atol=1e-30)


def test_lower_instruction_sets():
    """What CPUs without AVX-512 run; the choice is made once in a process."""
    code = """
import test_attention_kernel as tests
for mask in tests.MASKS:
    tests.check(1, 131, 150, 2, 2, 40, mask)
    tests.check(1, 131, 150, 2, 2, 40, mask, value_dim=24, soft_cap=2.0, has_sinks=True)
tests.check(1, 300, 300, 2, 2, 40, "packed", window=50, soft_cap=2.0, has_sinks=True)
tests.check(1, 331, 331, 1, 1, 64, "causal")
"""
    path = f"{LLM}:{os.path.dirname(__file__)}:{LLM.parent}/tests"
    for isa in ("plain", "avx2"):
        result = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "OARLOCK_ISA": isa, "PYTHONPATH": path},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]


def some(shape=(2, 300, 4, 32), key_heads=2):
    paddle.seed(1)
    found = [paddle.randn([*shape[:2], heads, shape[3]]) for heads in (shape[2], key_heads, key_heads)]
    for tensor in found:
        tensor.stop_gradient = False
    return found


def with_gradients(tensors, ends=None, **features):
    output = fused_attention(*tensors[:3], ends, sinks=tensors[3] if len(tensors) > 3 else None, **features)
    return [output, *paddle.grad([output], tensors, [output.detach().cos()])]


def test_same_bits_for_any_number_of_threads():
    sinks = paddle.to_tensor([0.3, -1.0, 2.0, 0.0], stop_gradient=False)
    for tensors, features in ((some(key_heads=1), {}), ([*some(), sinks], {"window": 70, "soft_cap": 2.0})):
        results = []
        for threads in (1, 2, 3):
            paddle.base.core.set_num_threads(threads)
            results.append(with_gradients(tensors, **features))
        paddle.base.core.set_num_threads(import_paddle())
        for other in results[1:]:
            assert all((a == b).all() for a, b in zip(results[0], other, strict=True))


def test_a_packed_example_is_what_it_is_alone():
    """To the bit, whatever its neighbour in the tile is."""
    tensors = some((1, 256, 4, 32))
    ends = paddle.concat([paddle.full([1, 100], 100, "int32"), paddle.full([1, 156], 256, "int32")], axis=1)
    others = [paddle.concat([t[:, :100], t[:, 100:] * 50 + 3], axis=1).detach() for t in tensors]
    for tensor in others:
        tensor.stop_gradient = False
    alone = with_gradients([tensor[:, :100] for tensor in tensors])
    for found, wanted in zip(with_gradients(others, ends), alone, strict=True):
        assert (found[:, :100] == wanted).all()


def test_nan_and_large_scores():
    query, key, value = some((1, 70, 2, 32))
    output = fused_attention(query * 1e4, key, value)
    assert paddle.isfinite(output).all()
    query = query.detach()
    query[0, 3, 0, 0] = float("nan")
    found = fused_attention(query, key, value)
    assert paddle.isnan(found[0, 3, 0]).all() and int(paddle.isnan(found).sum()) == 32


def test_not_contiguous():
    tensors = some()
    turned = [tensor.transpose([0, 2, 1, 3]).contiguous().transpose([0, 2, 1, 3]) for tensor in tensors]
    assert not turned[0].is_contiguous()
    for found, wanted in zip(with_gradients(turned), with_gradients(tensors), strict=True):
        assert (found == wanted).all()


def test_empty():
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        assert [list(t.shape) for t in with_gradients(some(shape, 2))] == [list(shape)] * 4


def test_refuses():
    query, key, value = some()
    ends = paddle.full([2, 300], 300, "int32")
    wrong = {
        "key has to be": (query, key[:1], value),
        "value has to be": (query, key, value[:, :5]),
        "a multiple of the key's; got 3 and 2": (query[:, :, :3], key, value),
        r"\[batch, tokens, heads, head_dim\]": (query[0], key, value),
        "query has to be float32; got float64": (query.astype("float64"), key, value),
        "ends has to be int32; got int64": (query, key, value, ends.astype("int64")),
        r"ends has to be \[2, 300\]; got \[2, 299\]": (query, key, value, ends[:, 1:]),
        r"bias has to be \[2, 1, 300, 300\]; got \[2, 3, 300, 300\]":
            (query, key, value, None, paddle.zeros([2, 3, 300, 300])),
    }  # fmt: skip
    for text, arguments in wrong.items():
        with pytest.raises(ValueError, match=text):
            fused_attention(*arguments)
    with pytest.raises(ValueError, match="a window has to be above 0, and without a bias; got 5"):
        fused_attention(query, key, value, None, paddle.zeros([2, 1, 300, 300]), window=5)
    with pytest.raises(ValueError, match=r"sinks has to be \[4\]; got \[3\]"):
        fused_attention(query, key, value, sinks=paddle.zeros([3]))


def test_a_wrong_operator_is_refused(monkeypatch):
    self_check.check_attention.__wrapped__()
    monkeypatch.setattr(self_check, "reference_attention", lambda *given: 2 * reference_attention(*given))
    with pytest.raises(EnvironmentProblem, match="fused attention gives wrong results on this machine"):
        self_check.check_attention.__wrapped__()
