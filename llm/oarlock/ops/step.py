"""Parts of a training step in one pass over memory, forward and backward (custom_ops/training_step).

Float32 on the CPU. `install` puts them behind PaddleNLP's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
from paddle.autograd import PyLayer

from oarlock.ops import library

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


def fused_lora_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """x weight + scaling * (x a) b: [..., in] -> [..., out]. No gradient for weight, which LoRA leaves as it is.

    Args:
        weight: [in, out]; a: [in, rank]; b: [rank, out].
    """
    return library.run("fused_lora_linear", x, weight, a, b, scaling)[0]


# Scores that exist at a time: 32 MB, which caches hold; more where each piece goes over the weight's whole gradient.
SCORES, SCORES_FOR_WEIGHT = 2**23, 2**25


class _LinearCrossEntropy(PyLayer):
    """The gradients are made in the forward, piece by piece, so that no more than a piece of the scores exists."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float,
                ignored: int, wanted: tuple[bool, bool]) -> Tensor:  # fmt: skip
        most = SCORES_FOR_WEIGHT if wanted[1] else SCORES
        losses, *gradients = library.run(
            "fused_linear_cross_entropy", hidden, weight, labels, transposed, scale, ignored, most, *wanted
        )
        ctx.gradients = [gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True)]
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()  # the caller's now, who may write to them
        factor = float(grad)
        return (*(g if g is None or factor == 1 else g.scale_(factor) for g in gradients), None)


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float, ignored: int
) -> Tensor:
    """scale * sum of -log softmax(hidden weight)[label], a scalar, without all of the scores in memory at a time.

    Can be differentiated once (Paddle crashes in a second pass through any PyLayer).

    Args:
        hidden: [..., width].
        weight: [width, classes]; `transposed`: [classes, width].
        labels: int64 [...]; `ignored` where there is no loss.

    Raises:
        ValueError: when a label is no class, or shapes do not fit.
    """
    tracked = paddle.is_grad_enabled()
    wanted = tuple(tracked and not tensor.stop_gradient for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, transposed, scale, ignored, wanted)


@dataclass(frozen=True)
class HeldScores:
    """What a language model's head would multiply, so that the loss can do it piece by piece.

    Attributes:
        hidden: [batch, tokens, width].
        weight: [width, vocabulary]; `transposed`: [vocabulary, width].
    """

    hidden: Tensor
    weight: Tensor
    transposed: bool

    def __getitem__(self, tokens: Any) -> HeldScores:
        """The scores of some [batch, tokens]."""
        return HeldScores(self.hidden[tokens], self.weight, self.transposed)

    def cross_entropy(self, labels: Tensor, scale: float, ignored: int) -> Tensor:
        """fused_linear_cross_entropy of them."""
        return fused_linear_cross_entropy(self.hidden, self.weight, labels, self.transposed, scale, ignored)
