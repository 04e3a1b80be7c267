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
from oarlock.ops import attention, library, self_check

import_paddle()
import paddle  # noqa: E402

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


def check(batch, queries, keys, heads, groups, dim, mask, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(batch, queries, heads * groups, dim), (batch, keys, heads, dim), (batch, keys, heads, dim)]
    arrays = [random.normal(0, 1, shape).astype(np.float32) for shape in (*shapes, shapes[0])]
    ends, bias, seen = made_mask(random, mask, batch, queries, keys, heads * groups)
    tensors = [paddle.to_tensor(array, stop_gradient=False) for array in arrays[:3]]
    given_ends, given_bias = (None if array is None else paddle.to_tensor(array) for array in (ends, bias))
    output = attention.fused_attention(*tensors, given_ends, given_bias)
    found = [output, *paddle.grad([output], tensors, [paddle.to_tensor(arrays[3])])]
    expected = exact_attention(*arrays, seen, dim**-0.5, bias=0 if bias is None else bias)
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


def test_lower_instruction_sets():
    """What CPUs without AVX-512 run; the choice is made once in a process."""
    code = """
import test_attention_kernel as tests
for mask in tests.MASKS:
    tests.check(1, 131, 150, 2, 2, 40, mask)
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


def with_gradients(tensors, ends=None):
    output = attention.fused_attention(*tensors, ends)
    return [output, *paddle.grad([output], tensors, [output.detach().cos()])]


def test_same_bits_for_any_number_of_threads():
    tensors, results = some(key_heads=1), []
    for threads in (1, 2, 3):
        paddle.base.core.set_num_threads(threads)
        results.append(with_gradients(tensors))
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
    output = attention.fused_attention(query * 1e4, key, value)
    assert paddle.isfinite(output).all()
    query = query.detach()
    query[0, 3, 0, 0] = float("nan")
    found = attention.fused_attention(query, key, value)
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
            attention.fused_attention(*arguments)


def test_a_wrong_operator_is_refused(monkeypatch):
    self_check.check_attention.__wrapped__()
    monkeypatch.setattr(self_check, "reference_attention", lambda q, k, v, *_: attention.fused_attention(q, k, v))
    with pytest.raises(EnvironmentProblem, match="fused attention gives wrong results on this machine"):
        self_check.check_attention.__wrapped__()
