"""The fused operators compared with Paddle's own on small inputs, before training or serving uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import paddle
from paddle.nn import functional

from oarlock.errors import EnvironmentProblem
from oarlock.ops import library
from oarlock.ops.attention_backends.fused import fused_attention
from oarlock.ops.attention_backends.masks import dense_mask
from oarlock.ops.attention_backends.reference import reference_attention
from oarlock.ops.decoder_layer import fused_layer_end, fused_layer_start
from oarlock.ops.linear_cross_entropy import fused_linear_cross_entropy
from oarlock.ops.lora_linear import LoraTriple, fused_lora_linear, fused_lora_mlp, fused_lora_projections
from oarlock.ops.rms_norm import fused_rms_norm, reference_rms_norm
from oarlock.ops.rotary import fused_rotary
from oarlock.ops.swiglu import fused_swiglu
from oarlock.typing import Tensor

_REBUILD = "rm -r build/custom_ops; python custom_ops/build.py"


def require_equal(op: str, difference: float, tolerance: float, without: str) -> None:
    """Refuse an operator that computes something else than its reference.

    Args:
        op: name of the operator, and what of it was compared.
        difference: largest absolute difference. NaN is refused too.
        without: how to run without the operator, an imperative.

    Raises:
        EnvironmentProblem: if the difference is above the tolerance.
    """
    if not difference <= tolerance:
        raise EnvironmentProblem(
            f"{op} gives wrong results on this machine: it differs from the reference by {difference:.3g}. "
            f"Rebuild the fused ops ({_REBUILD}), or {without}"
        )


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@functools.cache
def check_norms() -> None:
    """Load the operators and compare RMSNorm with its reference, values and gradients, on this process's device.

    Raises:
        ImportError: if the operators are not built.
        EnvironmentProblem: if results differ.
    """
    library.load()
    rows = paddle.arange(3 * 37, dtype="float32").reshape([3, 37])
    wave, scale = (rows * 0.7).sin() * 3 + 0.5, (rows[0] * 0.3).cos() + 1
    wave.stop_gradient = scale.stop_gradient = False
    fused, reference = (
        [y, *paddle.grad([y], [wave, scale], [(rows * 0.1).sin()])]
        for y in (fused_rms_norm(wave, scale, 1e-5)[0], reference_rms_norm(wave, scale, 1e-5))
    )
    names = ("fused RMSNorm", "gradient of x in the fused RMSNorm", "gradient of scale in the fused RMSNorm")
    for name, found, expected in zip(names, fused, reference, strict=True):
        require_equal(name, _largest_difference(found, expected), 1e-4, "train without --use_fused_rms_norm")


@functools.cache
def check_attention() -> None:
    """Compare attention with its reference, values and gradients, on two packed examples of grouped heads.

    Raises:
        ImportError: if the operators are not built.
        EnvironmentProblem: if results differ.
    """
    query, key, value = (
        (paddle.arange(70 * heads * 20, dtype="float32") * slope).sin().reshape([1, 70, heads, 20])
        for heads, slope in ((4, 0.31), (2, 0.48), (2, 0.65))
    )
    query.stop_gradient = key.stop_gradient = value.stop_gradient = False
    ends = paddle.concat([paddle.full([1, 40], 40, "int32"), paddle.full([1, 30], 70, "int32")], axis=1)
    seen = dense_mask(70, 70, ends).unsqueeze(1)
    fused, reference = (
        [output, *paddle.grad([output], [query, key, value], [query.detach().cos()])]
        for output in (
            fused_attention(query, key, value, ends, scale=0.25),
            reference_attention(query, key, value, seen, 0.25),
        )
    )
    names = ("fused attention", *(f"gradient of {name} in the fused attention" for name in ("query", "key", "value")))
    for name, found, expected in zip(names, fused, reference, strict=True):
        require_equal(name, _largest_difference(found, expected), 1e-4, "train with --fused_ops false")


@functools.cache
def check_training_ops() -> None:
    """Compare the other operators of a training step with Paddle's own, values and gradients.

    Raises:
        EnvironmentProblem: if results differ.
    """
    for name, functions in _pairs_of_training_ops().items():
        results = []
        for function in functions:
            x = (_wave() * 3 + 0.1).detach()
            x.stop_gradient = False
            y = function(x)
            results.append((y.detach(), *paddle.grad([y], [x], [(y.detach() + 1).sin()])))
        difference = max(_largest_difference(a, b) for a, b in zip(*results, strict=True))
        require_equal(name, difference, 1e-3, "train with --fused_ops false")


def _wave() -> Tensor:
    """The input [24, 24] that all comparisons are built from."""
    return (paddle.arange(24 * 24, dtype="float32") * 0.7).sin().reshape([24, 24])


def _pairs_of_training_ops() -> Mapping[str, Sequence[Callable[[Tensor], Tensor]]]:
    """For each operator a function [24, 24] -> tensor that uses it, and one that gives the same in Paddle's ops."""
    wave = _wave()
    labels = paddle.arange(24)
    triple = LoraTriple([wave, wave.t(), wave + 0.1], [wave[:, :8]] * 3, [wave[:8]] * 3, [0.5, 1.0, 2.0])
    merged = [
        weight + wave[:, :8] @ wave[:8] * scaling
        for weight, scaling in zip(triple.weights, triple.scalings, strict=True)
    ]

    def split_heads(x: Tensor) -> Tensor:
        return x.reshape([2, 12, 2, 12])

    def rotate(x: Tensor) -> Tensor:
        q, k = fused_rotary(split_heads(x), split_heads(x), wave[:12, :12], wave[12:, 12:], None)
        return (q + k) / 2

    def rotate_in_paddle(x: Tensor) -> Tensor:
        first, second = split_heads(x).chunk(2, axis=-1)
        rotated = paddle.concat([-second, first], axis=-1)
        return split_heads(x) * wave[:12, :12].unsqueeze(1) + rotated * wave[12:, 12:].unsqueeze(1)

    def run_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (functional.silu(x @ gate) * (x @ up)) @ down

    def normalize(x: Tensor) -> Tensor:
        return reference_rms_norm(x, wave[0] + 1, 1e-6)

    return {
        "fused rotary embedding": (rotate, rotate_in_paddle),
        "fused SwiGLU": (lambda x: fused_swiglu(x, wave), lambda x: functional.silu(x) * wave),
        "fused start of a decoder layer": (
            lambda x: paddle.add_n(fused_layer_start(x, wave[0] + 1, wave, wave.t(), wave, 1e-6)[:4]),
            lambda x: normalize(x) @ (wave * 2 + wave.t()) + x,
        ),
        "fused end of a decoder layer": (
            lambda x: fused_layer_end(x, x, wave / 8, wave[0] + 1, wave / 8, wave.t() / 8, wave, 1e-6),
            lambda x: x + x @ wave / 8 + run_mlp(normalize(x + x @ wave / 8), wave / 8, wave.t() / 8, wave),
        ),
        "fused linear layer with LoRA": (
            lambda x: fused_lora_linear(x, wave, wave[:, :8], wave[:8], 2.0),
            lambda x: x @ wave + x @ wave[:, :8] @ wave[:8] * 2.0,
        ),
        "fused projections with LoRA": (
            lambda x: paddle.concat(fused_lora_projections(x, triple), axis=-1),
            lambda x: paddle.concat([x @ weight for weight in merged], axis=-1),
        ),
        "fused MLP with LoRA": (
            lambda x: fused_lora_mlp(x / 8, triple),
            lambda x: run_mlp(x / 8, *merged),
        ),
        "fused cross entropy": (
            lambda x: fused_linear_cross_entropy(x, wave, labels, False, 0.1, -100),
            lambda x: functional.cross_entropy(x @ wave, labels, reduction="sum") * 0.1,
        ),
    }
