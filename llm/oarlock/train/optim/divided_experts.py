"""Gradients and optimizer states of experts that the ranks divide among them (expert parallelism).

Fleet knows no such parameters here: to it, all data-parallel and sharding ranks hold the same ones. So it leaves them
out, and their gradients are reduced by this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import (
    DygraphShardingOptimizer,
    HybridParallelOptimizer,
)
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group

from oarlock.decoder.moe import MixtureOfExperts
from oarlock.parallel.expert_groups import find_expert_groups
from oarlock.parallel.plan import ParallelPlan


def is_divided(parameter: Any) -> bool:
    """Whether a parameter belongs to an expert that only some of the data-parallel and sharding ranks hold."""
    return bool(getattr(parameter, "no_sync", False))  # Paddle's own mark, which its wrappers respect


class DividedExperts:
    """The experts of this rank's model, if the plan divides them.

    Args:
        model: not wrapped. LoRA's matrices of experts are divided as well.
    """

    def __init__(self, model: nn.Layer, plan: ParallelPlan) -> None:
        self._groups, self._replicas = find_expert_groups(), plan.replicas
        self._parameters: list[Any] = []
        if plan.expert > 1:
            mixtures = [layer for layer in model.sublayers() if isinstance(layer, MixtureOfExperts)]
            self._parameters = [parameter for mixture in mixtures for parameter in mixture.experts.parameters()]
        for parameter in self._parameters:
            parameter.no_sync = True

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks with the same experts, and divide them by the number of replicas.

        An expert's gradient already has the tokens of all ranks that sent it some. Other gradients are averaged over
        the replicas, and so the loss is scaled for that.
        """
        trained = [parameter for parameter in self._parameters if not parameter.stop_gradient]
        if not trained:
            return
        assert self._groups is not None
        if self._groups.copies is not None:
            fused_allreduce_gradients_with_group(trained, self._groups.copies, scale=1 / self._replicas)
            return
        with paddle.no_grad():
            for parameter in trained:
                gradient = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
                gradient.scale_(1 / self._replicas)

    def leave_out_of(self, optimizer: Any) -> None:
        """Keep Fleet's optimizer from reducing these gradients, and from sharding these parameters' states.

        Their states are not sharded over the ranks with the same experts; they are divided as the experts are.

        Args:
            optimizer: wrapped by Fleet, or not.
        """
        if not self._parameters or not isinstance(optimizer, HybridParallelOptimizer):
            return
        sync = optimizer._hybrid_sync_grad
        optimizer._hybrid_sync_grad = lambda parameters: sync(_shared_ones(parameters))
        if isinstance(optimizer._inner_opt, DygraphShardingOptimizer):
            _leave_out_of_sharding(optimizer._inner_opt)


def _shared_ones(parameters: Sequence[Any]) -> list[Any]:
    return [parameter for parameter in parameters if not is_divided(parameter)]


def _leave_out_of_sharding(optimizer: Any) -> None:
    """Assign the other parameters to sharding ranks anew; every rank updates its experts, and keeps them to itself."""
    everything, me = optimizer._parameter_list, optimizer._sharding_rank
    optimizer._parameter_list = _shared_ones(everything)
    sharded = optimizer._partition_parameters()
    optimizer._parameter_list = everything
    experts = [parameter for parameter in everything if is_divided(parameter)]
    updated = sharded | {me: sharded[me] + experts}
    optimizer._rank2params = updated
    optimizer._param2rank = optimizer._map_param_to_rank()
    for name in ("_parameter_list", "_param_groups"):
        optimizer._set_inner_opt_attr(name, updated[me])
    reduce, broadcast = optimizer.reduce_gradients, optimizer._sharding_sync_parameters
    optimizer.reduce_gradients = lambda parameters, hcg: reduce(_shared_ones(parameters), hcg)

    def broadcast_sharded() -> None:
        optimizer._rank2params = sharded
        try:
            broadcast()
        finally:
            optimizer._rank2params = updated

    optimizer._sharding_sync_parameters = broadcast_sharded
