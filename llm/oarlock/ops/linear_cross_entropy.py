"""Cross entropy from hidden states and the head's weight, chunk by chunk (custom_ops/linear_cross_entropy).

loss = scale * sum over tokens of log(sum(exp(logits))) - logits[label], with logits = hidden weight.
Float32 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from oarlock.ops import library
from oarlock.typing import Tensor

# At most this many logits exist at a time (128 MB). Each chunk reads the whole weight, so small chunks are slow.
MAX_LOGITS = 2**25


class _LinearCrossEntropy(PyLayer):
    """The forward computes the gradients too, chunk by chunk, so that no more than one chunk of the logits exists."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float, ignored: int,
                wanted: tuple[bool, bool], group: Any) -> Tensor:  # fmt: skip
        rows, targets = hidden.reshape([-1, hidden.shape[-1]]), labels.flatten()
        classes, count = weight.shape[not transposed], max(len(rows), 1)
        first, ranks = (group.rank * classes, group.nranks) if group else (0, 1)
        grad_weight = paddle.empty(weight.shape if wanted[1] else [0], weight.dtype)

        def run_chunk(begin: int, end: int) -> tuple[Tensor, Tensor]:
            x, label = rows[begin:end], targets[begin:end]
            exponentials, stats = library.run(
                "fused_linear_softmax", x, weight, label, transposed, ignored, first, classes * ranks
            )
            largest, total, at_label = _combine_ranks(stats, group)
            losses = paddle.where(label == ignored, paddle.zeros_like(total), total.log() + (largest - at_label))
            grad = None
            if any(wanted):
                factors = (stats[0] - largest).exp() * scale / total
                *_, grad = library.run(
                    "fused_linear_softmax_gradient", exponentials, grad_weight, x, weight, label, factors,
                    transposed, scale, ignored, first, begin == 0, *wanted,
                )  # fmt: skip
            return losses.sum() * scale, grad

        size = math.ceil(count / math.ceil(count * classes / MAX_LOGITS))  # chunks of one size
        losses, grads = zip(*(run_chunk(at, at + size) for at in range(0, count, size)), strict=True)
        grad_hidden = paddle.concat(grads).reshape(hidden.shape) if wanted[0] else None
        ctx.gradients = [grad_hidden, grad_weight if wanted[1] else None]
        return paddle.add_n(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()  # the caller's now, who may write to them
        factor = float(grad)
        return (*(g if g is None or factor == 1 else g.scale_(factor) for g in gradients), None)


def _combine_ranks(stats: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Combine each rank's stats [3, rows]: largest logit, sum of exp(logit - largest), logit at the label."""
    if not group:
        return stats[0], stats[1], stats[2]
    gathered: list[Tensor] = []
    dist.all_gather(gathered, stats, group=group)
    largest, totals, at_label = paddle.stack(gathered, axis=1)
    largest_of_all = largest.max(axis=0)
    return largest_of_all, (totals * (largest - largest_of_all).exp()).sum(axis=0), at_label.max(axis=0)


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, transposed: bool, scale: float, ignored: int, group: Any = None
) -> Tensor:
    """Compute scale * sum(-log softmax(hidden weight)[label]), a scalar, without holding all logits in memory.

    It can be differentiated once (Paddle crashes in a second pass through any PyLayer).

    Args:
        hidden: [..., width].
        weight: [width, classes], or [classes, width] if `transposed`.
        labels: int64 [...]; `ignored` marks tokens without a loss.
        group: the ranks that shard the classes, in order (Megatron-LM's vocabulary parallel loss,
            https://arxiv.org/abs/1909.08053). The gradient of `hidden` then covers this rank's classes only.

    Raises:
        ValueError: when a label is no class, or shapes do not fit.
    """
    tracked = paddle.is_grad_enabled()
    wanted = tuple(tracked and not tensor.stop_gradient for tensor in (hidden, weight))
    return _LinearCrossEntropy.apply(hidden, weight, labels, transposed, scale, ignored, wanted, group)


@dataclass(frozen=True)
class DeferredLogits:
    """The two factors of the logits of a language model's head, so that the loss can multiply them chunk by chunk.

    Attributes:
        hidden: [batch, tokens, width].
        weight: [width, vocabulary], or [vocabulary, width] if `transposed`.
        group: the ranks that shard the vocabulary (tensor parallel), or None.
    """

    hidden: Tensor
    weight: Tensor
    transposed: bool
    group: Any = None

    def __getitem__(self, tokens: Any) -> DeferredLogits:
        """The deferred logits of some [batch, tokens]."""
        return DeferredLogits(self.hidden[tokens], self.weight, self.transposed, self.group)

    def cross_entropy(self, labels: Tensor, scale: float, ignored: int) -> Tensor:
        """Compute fused_linear_cross_entropy from these factors."""
        return fused_linear_cross_entropy(self.hidden, self.weight, labels, self.transposed, scale, ignored, self.group)
