"""Sends tokens to the ranks that hold their experts, and back (expert parallelism, https://arxiv.org/abs/2006.16668)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer

from oarlock.typing import Tensor


class _AllToAll(PyLayer):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group)


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = paddle.empty([sum(received), *rows.shape[1:]], rows.dtype)
    dist.alltoall_single(out, rows.contiguous(), sent, received, group=group)
    return out


class TokenExchange:
    """One exchange of tokens among the ranks of a group, which hold equally many experts.

    Args:
        counts: int64 [experts], this rank's tokens for each expert of all ranks.
        group: Paddle's group of the ranks.

    Attributes:
        counts: tokens that this rank receives for each of its experts.
    """

    def __init__(self, counts: Tensor, group: Any) -> None:
        sent = counts.reshape([group.nranks, -1])
        received = paddle.empty_like(sent)
        dist.alltoall_single(received, sent, group=group)
        by_sender = received.numpy()
        self._group = group
        self._sent, self._received = sent.sum(1).tolist(), by_sender.sum(1).tolist()
        self.counts: Sequence[int] = by_sender.sum(0).tolist()
        # Tokens arrive sorted by sender, then expert, and have to be sorted by expert.
        experts = np.repeat(np.tile(np.arange(by_sender.shape[1]), len(by_sender)), by_sender.reshape(-1))
        order = np.argsort(experts, kind="stable")
        self._order, self._inverse = paddle.to_tensor(order), paddle.to_tensor(np.argsort(order))

    def send(self, rows: Tensor) -> Tensor:
        """[this rank's tokens, hidden] -> [tokens of this rank's experts, hidden], both sorted by expert."""
        arrived = _AllToAll.apply(rows, self._sent, self._received, self._group)
        return paddle.index_select(arrived, self._order)

    def send_back(self, rows: Tensor) -> Tensor:
        """The reverse of send()."""
        sorted_by_sender = paddle.index_select(rows, self._inverse)
        return _AllToAll.apply(sorted_by_sender, self._received, self._sent, self._group)
