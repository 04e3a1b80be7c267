"""Data-parallel ranks: this rank's replica, and reductions over the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from oarlock.train.optim.divided_experts import is_divided


@dataclass(frozen=True)
class DataParallelRanks:
    """The replicas of the model, each of which trains on its own samples.

    Attributes:
        world_size: number of all ranks.
        replicas: number of replicas (data parallelism and sharding together).
        replica: index of this rank's replica.
        reduces_gradients: reduce_gradients() averages the gradients. This is so for pure data parallelism on a CPU,
            because the reducer of paddle.DataParallel is C++ code over Paddle's own process groups.
    """

    world_size: int
    replicas: int
    replica: int
    reduces_gradients: bool = False

    @classmethod
    def from_args(cls, args: Any) -> DataParallelRanks:
        """Read the degrees from PaddleNLP's TrainingArguments."""
        world_size = args.world_size
        replica = args.dataset_rank if world_size > 1 else 0
        reduces_gradients = world_size > 1 and not args.use_hybrid_parallel and args.device == "cpu"
        return cls(world_size, max(1, args.dataset_world_size), replica, reduces_gradients)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over the replicas. All ranks have to call it."""
        if self.world_size <= 1:
            return list(numbers)
        total = paddle.to_tensor(numbers, dtype="float64")
        paddle.distributed.all_reduce(total)
        copies = self.world_size // self.replicas
        return [float(number) / copies for number in total]

    def mean(self, number: float) -> float:
        """Mean of a number over the replicas."""
        return self.sum([number])[0] / self.replicas

    def reduce_gradients(self, model: nn.Layer) -> None:
        """Average the gradients, if no wrapper of the model does so; not those of divided experts."""
        if self.reduces_gradients:
            shared = [parameter for parameter in model.parameters() if not is_divided(parameter)]
            fused_allreduce_gradients(shared, None)
