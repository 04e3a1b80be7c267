"""Tensor-parallel operators for CPUs, made of Paddle's ordinary operators and a process group.

Paddle has them for GPUs only. The formulas are those of Megatron-LM (https://arxiv.org/abs/1909.08053) and of Paddle's
kernels.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer


def identity(tensor: Tensor, *_: Any) -> Tensor:
    """The operator c_identity, in both Python forms: a copy. The PyLayers that call it handle the gradient."""
    return paddle.assign(tensor)


class _Concat(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.begin, ctx.end = group.rank * tensor.shape[-1], (group.rank + 1) * tensor.shape[-1]
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[..., ctx.begin : ctx.end].contiguous()


class _Split(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group, width = group, tensor.shape[-1] // group.nranks
        return tensor[..., group.rank * width : (group.rank + 1) * width].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _gathered(grad, ctx.group)


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    parts: list[Tensor] = []
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return paddle.concat(parts, axis=-1)


def concat(tensor: Tensor, group: Any = None) -> Tensor:
    """[..., n] of each rank -> [..., n x ranks] on all; mp_ops._c_concat."""
    return _Concat.apply(tensor, _group(group))


def split(tensor: Tensor, group: Any = None) -> Tensor:
    """[..., n x ranks] on all -> this rank's [..., n]; mp_ops._c_split."""
    return _Split.apply(tensor, _group(group))


class _CrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor, group: Any, ignore_index: int) -> tuple[Tensor, Tensor]:
        width = logits.shape[-1]
        top = logits.max(axis=-1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - top
        exps = shifted.exp()
        local = label - group.rank * width
        mine = ((local >= 0) & (local < width)).astype(logits.dtype)
        index = paddle.clip(local, 0, width - 1)
        # One message for both sums: the partition function and the label's logit.
        sums = paddle.concat(
            [exps.sum(axis=-1, keepdim=True), paddle.take_along_axis(shifted, index, axis=-1) * mine], axis=-1
        )
        dist.all_reduce(sums, group=group)
        total, target = sums[..., :1], sums[..., 1:]
        valid = (label != ignore_index).astype(logits.dtype)
        softmax = exps / total
        ctx.save_for_backward(softmax, index, mine, valid)
        return (total.log() - target) * valid, softmax

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _softmax_grad: Tensor) -> Tensor:
        softmax, index, mine, valid = ctx.saved_tensor()
        at_label = paddle.put_along_axis(paddle.zeros_like(softmax), index, mine, axis=-1)
        return (softmax - at_label) * (grad * valid)


def softmax_with_cross_entropy(
    logits: Tensor, label: Tensor, group: Any = None, return_softmax: bool = False, ignore_index: int = -100
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits that are sharded along the vocabulary; mp_ops._c_softmax_with_cross_entropy.

    Args:
        logits: [..., vocabulary / ranks].
        label: [...] or [..., 1], ids of the full vocabulary.

    Returns:
        The loss [..., 1], 0 where the label is ignore_index; with return_softmax also the softmax [..., vocabulary /
        ranks].
    """
    if label.ndim == logits.ndim - 1:
        label = label.unsqueeze(-1)
    loss, softmax = _CrossEntropy.apply(logits, label, _group(group), ignore_index)
    return (loss, softmax) if return_softmax else loss


def _group(group: Any) -> Any:
    return group if group is not None else dist.collective._get_default_group()
