"""Parts of a training step in one pass over memory, forward and backward (custom_ops/training_step).

Float32 on the CPU. `install` puts them behind PaddleNLP's names. Linear layers are in `linears`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.nn import functional

from oarlock.errors import EnvironmentProblem
from oarlock.ops import library
from oarlock.ops.decoder_layer import fused_layer_end, fused_layer_start
from oarlock.ops.lora_linear import Three, fused_lora_linear, fused_lora_mlp, fused_lora_projections
from oarlock.ops.norms import reference_rms_norm

Tensor = Any


def fused_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k: x * cos + rotate_half(x) * sin (https://arxiv.org/abs/2104.09864).

    Args:
        q, k: [batch, length, heads, dim], each with its number of heads.
        cos, sin: [positions, dim], axes of 1 may lie around.
        positions: int64 [batch, length]; None where each row counts from 0.

    Raises:
        ValueError: when a position is outside of cos and sin, or shapes do not fit.
    """
    return tuple(library.run("fused_rotary", q, k, cos, sin, positions))


def fused_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, all of one shape; without `up`, gate holds both, beside each other on the last axis."""
    return library.run("fused_swiglu_halves", gate) if up is None else library.run("fused_swiglu", gate, up)


# That exist at a time: 128 MB. Each piece reads the whole weight, so small pieces wait for memory.
SCORES = 2**25


class _LinearCrossEntropy(PyLayer):
    """The gradients are made in the forward, piece by piece, so that no more than a piece of the scores exists."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float, ignored: int,
                wanted: tuple[bool, bool], group: Any) -> Tensor:  # fmt: skip
        rows, targets = hidden.reshape([-1, hidden.shape[-1]]), labels.flatten()
        classes, count = weight.shape[not transposed], max(len(rows), 1)
        first, ranks = (group.rank * classes, group.nranks) if group else (0, 1)
        grad_weight = paddle.empty(weight.shape if wanted[1] else [0], weight.dtype)

        def piece(begin: int, end: int) -> tuple[Tensor, Tensor]:
            x, label = rows[begin:end], targets[begin:end]
            exponentials, stats = library.run(
                "fused_linear_softmax", x, weight, label, transposed, ignored, first, classes * ranks
            )
            largest, total, at_label = _of_all_ranks(stats, group)
            losses = paddle.where(label == ignored, paddle.zeros_like(total), total.log() + (largest - at_label))
            grad = None
            if any(wanted):
                factors = (stats[0] - largest).exp() * scale / total
                *_, grad = library.run(
                    "fused_linear_softmax_gradient", exponentials, grad_weight, x, weight, label, factors,
                    transposed, scale, ignored, first, begin == 0, *wanted,
                )  # fmt: skip
            return losses.sum() * scale, grad

        size = math.ceil(count / math.ceil(count * classes / SCORES))  # pieces of one size
        losses, grads = zip(*(piece(at, at + size) for at in range(0, count, size)), strict=True)
        grad_hidden = paddle.concat(grads).reshape(hidden.shape) if wanted[0] else None
        ctx.gradients = [grad_hidden, grad_weight if wanted[1] else None]
        return paddle.add_n(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()  # the caller's now, who may write to them
        factor = float(grad)
        return (*(g if g is None or factor == 1 else g.scale_(factor) for g in gradients), None)


def _of_all_ranks(stats: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest score, sum of exp(score - largest), and score at the label, by each rank's stats [3, rows]."""
    if not group:
        return stats[0], stats[1], stats[2]
    parts: list[Tensor] = []
    dist.all_gather(parts, stats, group=group)
    largest, totals, at_label = paddle.stack(parts, axis=1)
    most = largest.max(axis=0)
    return most, (totals * (largest - most).exp()).sum(axis=0), at_label.max(axis=0)


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float, ignored: int, group: Any = None
) -> Tensor:
    """scale * sum of -log softmax(hidden weight)[label], a scalar, without all of the scores in memory at a time.

    Can be differentiated once (Paddle crashes in a second pass through any PyLayer).

    Args:
        hidden: [..., width].
        weight: [width, classes]; `transposed`: [classes, width].
        labels: int64 [...]; `ignored` where there is no loss.
        group: whose ranks have the classes, each its part of them in order (Megatron-LM's vocabulary parallel loss,
            https://arxiv.org/abs/1909.08053). hidden's gradient is of this rank's classes alone.

    Raises:
        ValueError: when a label is no class, or shapes do not fit.
    """
    tracked = paddle.is_grad_enabled()
    wanted = tuple(tracked and not tensor.stop_gradient for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, transposed, scale, ignored, wanted, group)


@dataclass(frozen=True)
class HeldScores:
    """What a language model's head would multiply, so that the loss can do it piece by piece.

    Attributes:
        hidden: [batch, tokens, width].
        weight: [width, vocabulary]; `transposed`: [vocabulary, width].
        group: whose ranks have parts of the vocabulary (tensor parallel).
    """

    hidden: Tensor
    weight: Tensor
    transposed: bool
    group: Any = None

    def __getitem__(self, tokens: Any) -> HeldScores:
        """The scores of some [batch, tokens]."""
        return HeldScores(self.hidden[tokens], self.weight, self.transposed, self.group)

    def cross_entropy(self, labels: Tensor, scale: float, ignored: int) -> Tensor:
        """fused_linear_cross_entropy of them."""
        return fused_linear_cross_entropy(self.hidden, self.weight, labels, self.transposed, scale, ignored, self.group)


@functools.cache
def check_step() -> None:
    """Compare the operators with Paddle's own, values and gradients, on a small input.

    Raises:
        EnvironmentProblem: when they compute something else; training with them would go wrong without a word.
    """
    wave = (paddle.arange(24 * 24, dtype="float32") * 0.7).sin().reshape([24, 24])
    labels = paddle.arange(24)
    three = Three([wave, wave.t(), wave + 0.1], [wave[:, :8]] * 3, [wave[:8]] * 3, [0.5, 1.0, 2.0])
    whole = [
        weight + wave[:, :8] @ wave[:8] * scaling for weight, scaling in zip(three.weights, three.scalings, strict=True)
    ]

    def heads(x: Tensor) -> Tensor:
        return x.reshape([2, 12, 2, 12])

    def turned(x: Tensor) -> Tensor:
        first, second = heads(x).chunk(2, axis=-1)
        half_turned = paddle.concat([-second, first], axis=-1)
        return heads(x) * wave[:12, :12].unsqueeze(1) + half_turned * wave[12:, 12:].unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        q, k = fused_rotary(heads(x), heads(x), wave[:12, :12], wave[12:, 12:], None)
        return (q + k) / 2

    def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (functional.silu(x @ gate) * (x @ up)) @ down

    def normed(x: Tensor) -> Tensor:
        return reference_rms_norm(x, wave[0] + 1, 1e-6)

    pairs = {
        "rotary embedding": (rotated, turned),
        "SwiGLU": (lambda x: fused_swiglu(x, wave), lambda x: functional.silu(x) * wave),
        "start of a layer": (
            lambda x: paddle.add_n(fused_layer_start(x, wave[0] + 1, wave, wave.t(), wave, 1e-6)[:4]),
            lambda x: normed(x) @ (wave * 2 + wave.t()) + x,
        ),
        "end of a layer": (
            lambda x: fused_layer_end(x, x, wave / 8, wave[0] + 1, wave / 8, wave.t() / 8, wave, 1e-6),
            lambda x: x + x @ wave / 8 + gated(normed(x + x @ wave / 8), wave / 8, wave.t() / 8, wave),
        ),
        "LoRA": (
            lambda x: fused_lora_linear(x, wave, wave[:, :8], wave[:8], 2.0),
            lambda x: x @ wave + x @ wave[:, :8] @ wave[:8] * 2.0,
        ),
        "projections with LoRA": (
            lambda x: paddle.concat(fused_lora_projections(x, three), axis=-1),
            lambda x: paddle.concat([x @ weight for weight in whole], axis=-1),
        ),
        "MLP with LoRA": (
            lambda x: fused_lora_mlp(x / 8, three),
            lambda x: gated(x / 8, *whole),
        ),
        "cross entropy": (
            lambda x: fused_linear_cross_entropy(x, wave, labels, False, 0.1, -100),
            lambda x: functional.cross_entropy(x @ wave, labels, reduction="sum") * 0.1,
        ),
    }
    for name, functions in pairs.items():
        results = []
        for function in functions:
            x = (wave * 3 + 0.1).detach()
            x.stop_gradient = False
            y = function(x)
            results.append((y.detach(), *paddle.grad([y], [x], [(y.detach() + 1).sin()])))
        difference = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
        if not difference <= 1e-3:  # NaN too
            raise EnvironmentProblem(
                f"the fused {name} is wrong on this machine: it differs from the reference by {difference:.3g}. Build "
                "it again (rm -r build/custom_ops; python custom_ops/build.py), or train with --fused_ops false"
            )
