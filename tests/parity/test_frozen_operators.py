"""Operator by operator: freezing some inputs does not change the gradients of the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional as F

from oarlock.ops import attention, corrections, decoder_layer, linear_cross_entropy, lora_linear, rotary, swiglu
from oarlock.ops import rms_norm as norm_ops
from oarlock.peft.quantization import Quantization, QuantizedMatmul, QuantizedWeight
from op_checks import built

EPSILON = 1e-5


@pytest.fixture(autouse=True)
def corrected(paddles_own_ops):
    corrections.install()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


@dataclass(frozen=True)
class Operator:
    """An operator of several inputs.

    Attributes:
        run: of the tensors; gives one or several.
        inputs: their values.
        reference: the same in Paddle's ordinary operators, for one that has no float64.
        always: positions of inputs that are never trained.
    """

    run: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    reference: Callable[..., Any] | None = None
    always: tuple[int, ...] = ()


def rms_norm(x, scale):
    return x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * scale


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * paddle.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON) * scale + bias


def gated(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def attend(query, key, value):
    scores = paddle.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    scores += paddle.triu(paddle.full(scores.shape[2:], -1e9, scores.dtype), 1)
    return paddle.einsum("bhij,bjhd->bihd", F.softmax(scores), value)


def beside(x, weight, a, b):
    return x @ weight + 2.0 * (x @ a) @ b


def three(rest) -> lora_linear.LoraTriple:
    return lora_linear.LoraTriple(rest[:3], rest[3:6], rest[6:], [2.0, 2.0, 2.0])


def each_beside(x, *rest):
    return [beside(x, rest[i], rest[3 + i], rest[6 + i]) for i in range(3)]


def transposed(q, k):
    cos, sin = (paddle.to_tensor(random(6, 8, seed=seed)).astype(q.dtype).unsqueeze(1) for seed in (3, 4))
    halves = [paddle.concat([-t[..., 4:], t[..., :4]], axis=-1) for t in (q, k)]
    return [t * cos + half * sin for t, half in zip((q, k), halves, strict=True)]


def fused_transposed(q, k):
    cos, sin = (paddle.to_tensor(random(6, 8, seed=seed).astype("float32")) for seed in (3, 4))
    return list(rotary.fused_rotary(q, k, cos, sin, None))


LABELS = np.arange(10).reshape(2, 5) % 12
X, SCALE, BIAS = random(2, 5, 16), 1 + 0.5 * random(16), random(16, seed=1)
SQUARE = [random(16, 16, seed=seed) / 4 for seed in range(6)]
LOW = [random(16, 4, seed=seed) / 4 for seed in range(3)] + [random(4, 16, seed=seed) / 4 for seed in range(3)]
HEADS = tuple(random(2, 6, 2, 8, seed=seed) for seed in range(3))

# All operators with several differentiable inputs in the graphs of the families.
PADDLES = {
    "layer_norm": Operator(lambda x, w, b: F.layer_norm(x, [16], w, b, EPSILON), (X, SCALE, BIAS), layer_norm),
    "layer_norm of two axes": Operator(
        lambda x, w, b: F.layer_norm(x, [5, 16], w, b, EPSILON), (X, random(80), random(80, seed=1))
    ),
    "layer_norm without bias": Operator(lambda x, w: F.layer_norm(x, [16], w, None, EPSILON), (X, SCALE)),
    "rms_norm": Operator(rms_norm, (X, SCALE)),
    "linear": Operator(F.linear, (X, SQUARE[0], BIAS)),
    "addmm": Operator(lambda b, x, w: paddle.addmm(b, x, w), (random(5, 16, seed=1), X[0], SQUARE[0])),
    "matmul": Operator(lambda x, w: paddle.matmul(x, w, transpose_y=True), (X, random(12, 16))),
    "bmm": Operator(paddle.bmm, (X, random(2, 16, 3))),
    "add": Operator(paddle.add, (X, BIAS)),
    "subtract": Operator(paddle.subtract, (X, BIAS)),
    "multiply": Operator(paddle.multiply, (X, SCALE)),
    "divide": Operator(paddle.divide, (X, 2 + np.abs(BIAS))),
    "concat": Operator(lambda x, y: paddle.concat([x, y], axis=1), (X, random(2, 3, 16))),
    "stack": Operator(lambda x, y: paddle.stack([x, y], axis=1), (X, random(2, 5, 16, seed=1))),
    "where": Operator(
        lambda x, y: paddle.where(paddle.to_tensor(X > 0), x, y), (random(2, 5, 16, seed=2), random(2, 5, 16, seed=1))
    ),
    "swiglu": Operator(F.swiglu, (X, random(2, 5, 16, seed=1))),
    "embedding": Operator(lambda w: F.embedding(paddle.to_tensor(LABELS), w), (random(12, 16),)),
    "conv2d": Operator(F.conv2d, (random(2, 3, 6, 6), random(4, 3, 3, 3), random(4))),
}
OURS = {
    "fused_rms_norm": Operator(lambda x, s: norm_ops.fused_rms_norm(x, s, EPSILON)[0], (X, SCALE), rms_norm),
    "fused_rms_norm_kept": Operator(
        lambda x, s: norm_ops.fused_rms_norm_kept(x, s, EPSILON), (X, SCALE), lambda x, s: [rms_norm(x, s), x]
    ),
    "fused_add_rms_norm": Operator(
        lambda x, r, s: norm_ops.fused_add_rms_norm(x, r, s, EPSILON)[:2], (X, random(2, 5, 16, seed=1), SCALE),
        lambda x, r, s: [rms_norm(x + r, s), x + r],
    ),
    "fused_ln": Operator(lambda x, s, b: norm_ops.fused_ln(x, s, b, EPSILON)[0], (X, SCALE, BIAS), layer_norm),
    "fused_swiglu": Operator(swiglu.fused_swiglu, (X, random(2, 5, 16, seed=1)), lambda x, y: F.silu(x) * y),
    "fused_rotary": Operator(fused_transposed, HEADS[:2], transposed),
    "fused_attention": Operator(attention.fused_attention, HEADS, attend),
    "fused_lora_linear": Operator(
        lambda x, w, a, b: lora_linear.fused_lora_linear(x, w, a, b, 2.0), (X, SQUARE[0], LOW[0], LOW[3]), beside, (1,)
    ),
    "fused_lora_projections": Operator(
        lambda x, *rest: list(lora_linear.fused_lora_projections(x, three(rest))), (X, *SQUARE[:3], *LOW), each_beside,
        (1, 2, 3),
    ),
    "fused_lora_mlp": Operator(
        lambda x, *rest: lora_linear.fused_lora_mlp(x, three(rest)), (X, *SQUARE[:3], *LOW),
        lambda x, *rest: gated(x, *(rest[i] + 2.0 * rest[3 + i] @ rest[6 + i] for i in range(3))), (1, 2, 3),
    ),
    "fused_layer_start": Operator(
        lambda x, s, *w: decoder_layer.fused_layer_start(x, s, *w, EPSILON)[:4], (X, SCALE, *SQUARE[:3]),
        lambda x, s, *w: [*(rms_norm(x, s) @ each for each in w), x],
    ),
    "fused_layer_end": Operator(
        lambda x, k, o, s, *w: decoder_layer.fused_layer_end(x, k, o, s, *w, EPSILON),
        (X, random(2, 5, 16, seed=1), SQUARE[3], SCALE, *SQUARE[:3]),
        lambda x, k, o, s, *w: k + x @ o + gated(rms_norm(k + x @ o, s), *w),
    ),
    "fused_linear_cross_entropy": Operator(
        lambda x, w: linear_cross_entropy.fused_linear_cross_entropy(x, w, paddle.to_tensor(LABELS), False, 0.1, -100),
        (X, random(16, 12)),
        lambda x, w: F.cross_entropy(x @ w, paddle.to_tensor(LABELS), reduction="sum") * 0.1,
    ),
}  # fmt: skip


def combinations(operator: Operator) -> list[tuple[bool, ...]]:
    """The ways to freeze some inputs but not all; a sample of them if there are many."""
    free = [i for i in range(len(operator.inputs)) if i not in operator.always]
    found = []
    for trained in itertools.product((False, True), repeat=len(free)):
        names = {i for i, wanted in zip(free, trained, strict=True) if wanted}
        if names and (len(free) <= 4 or len(names) in (1, 2, len(free) - 1, len(free))):
            found.append(tuple(i not in names for i in range(len(operator.inputs))))
    return found


def as_list(outputs) -> list:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def compute_slopes(operator: Operator, weights: list[np.ndarray]) -> list[float]:
    """Slopes of sum(weights * outputs) along a random direction of each input, by finite differences in float64."""
    run, size, found = operator.reference or operator.run, 1e-6, []
    for i in range(len(operator.inputs)):
        sums = []
        for sign in (1, -1):
            moved = [each + sign * size * direction(i, each) * (i == j) for j, each in enumerate(operator.inputs)]
            with paddle.no_grad():
                outputs = as_list(run(*(paddle.to_tensor(each) for each in moved)))
            sums.append(sum(float((output.numpy() * w).sum()) for output, w in zip(outputs, weights, strict=True)))
        found.append((sums[0] - sums[1]) / (2 * size))
    return found


def direction(position: int, values: np.ndarray) -> np.ndarray:
    return random(*values.shape, seed=50 + position)


def check_operator(operator: Operator) -> None:
    with paddle.no_grad():
        shapes = [
            each.shape
            for each in as_list((operator.reference or operator.run)(*map(paddle.to_tensor, operator.inputs)))
        ]
    weights = [random(*shape, seed=9) for shape in shapes]
    slopes = compute_slopes(operator, weights)
    for frozen in combinations(operator):
        tensors = [
            paddle.to_tensor(values.astype("float32"), stop_gradient=stop)
            for values, stop in zip(operator.inputs, frozen, strict=True)
        ]
        outputs = as_list(operator.run(*tensors))
        pairs = [(o, paddle.to_tensor(w.astype("float32"))) for o, w in zip(outputs, weights, strict=True)]
        pairs = [pair for pair in pairs if not pair[0].stop_gradient]
        paddle.autograd.backward([o for o, _ in pairs], [w for _, w in pairs])
        for i, tensor in enumerate(tensors):
            if frozen[i]:
                assert tensor.grad is None, f"frozen {frozen}: input {i} has a gradient"
                continue
            along = direction(i, operator.inputs[i])
            size = float(np.linalg.norm(tensor.grad.numpy()) * np.linalg.norm(along)) + 1e-3
            found = float((tensor.grad.numpy() * along).sum())
            assert abs(found - slopes[i]) < 2e-5 * size, f"frozen {frozen}: gradient of input {i}"


@pytest.mark.parametrize("name", PADDLES)
def test_paddle_operators(name):
    check_operator(PADDLES[name])


@built
@pytest.mark.parametrize("name", OURS)
def test_oarlock_operators(name):
    check_operator(OURS[name])


def test_matmul_with_a_quantized_weight():
    weight = QuantizedWeight(paddle.to_tensor(SQUARE[0].astype("float32")), 0, Quantization(block_size=16))
    wide = weight.value().numpy().astype("float64")
    check_operator(
        Operator(lambda x: QuantizedMatmul.apply(x, weight), (X,), lambda x: paddle.matmul(x, paddle.to_tensor(wide)))
    )


@pytest.mark.parametrize("correction", corrections.CORRECTIONS, ids=lambda patch: patch.name)
def test_each_correction_is_needed(correction):
    corrections.uninstall()
    try:
        check_operator(PADDLES[correction.name])
    except AssertionError as error:
        assert "gradient of input 0" in str(error)
    else:
        pytest.fail(f"Paddle no longer needs this correction: remove it ({correction.name} in ops/corrections.py)")


def test_every_alias_of_layer_norm_is_corrected():
    """The layer, its subclasses and the function, also with recomputation."""
    layer = nn.LayerNorm(16)
    layer.weight.set_value(SCALE.astype("float32"))
    expected = None
    for frozen, recomputed, as_layer in itertools.product((False, True), repeat=3):
        layer.weight.stop_gradient = frozen
        run = layer if as_layer else lambda x: paddle.nn.functional.layer_norm(x, 16, layer.weight, layer.bias)
        x = paddle.to_tensor(X.astype("float32"), stop_gradient=False)
        y = paddle.distributed.fleet.utils.recompute(run, x) if recomputed else run(x)
        y.backward(paddle.to_tensor(random(*X.shape, seed=9).astype("float32")))
        expected = x.grad.numpy() if expected is None else expected
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_changes_without_gradients():
    """A frozen norm weight has no gradient, and the forward pass is bit-identical."""
    weight, bias = (paddle.to_tensor(values.astype("float32")) for values in (SCALE, BIAS))
    found = []
    for stop in (True, False):
        x = paddle.to_tensor(X.astype("float32"), stop_gradient=stop)
        found.append(F.layer_norm(x, [16], weight, bias))
    assert np.array_equal(found[0].numpy(), found[1].numpy()) and found[0].stop_gradient and weight.stop_gradient
    found[1].sum().backward()
    assert weight.grad is None and bias.grad is None
