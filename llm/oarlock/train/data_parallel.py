"""The ranks that train on different samples, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients


@dataclass(frozen=True)
class DataParallelRanks:
    """This rank's place among the data-parallel replicas.

    Attributes:
        world_size: number of all ranks.
        replicas: copies of the model, each with its own samples (data parallel and sharding together).
        replica: index of the copy that this rank belongs to.
        reduces_gradients: pure data parallelism on a CPU, where the gradients are averaged here:
            paddle.DataParallel's reducer is C++ over Paddle's own process groups.
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
        """Sum each number over the replicas. All ranks have to call it; ranks of one replica count once."""
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
        """Average the gradients where no wrapper of the model does it."""
        if self.reduces_gradients:
            fused_allreduce_gradients(list(model.parameters()), None)
