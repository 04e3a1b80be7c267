"""This rank's shards of the model and the optimizer states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from oarlock.environment.ranks import rank
from oarlock.errors import CheckpointError
from oarlock.parallel.plan import ParallelPlan
from oarlock.train.optim.clip import SLICE
from oarlock.train.optim.divided_experts import is_divided
from oarlock.weights.layout import ParameterShard, TensorSlice, parameter_shards, shared_between_stages
from oarlock.weights.shard_index import MASTER, WEIGHTS, StoredShard
from oarlock.weights.sharded_store import ShardedStore

MASTER_NAME = "_fp32_master_0"  # what Optimizer._gen_master_weight_var_name makes of a parameter's name


@dataclass(frozen=True)
class LocalShard:
    """A parameter on this rank.

    Attributes:
        parameter: name of the parameter, and its slice of the full tensor.
        flat: range of the flattened slice that stage 3 keeps on this rank; None without stage 3.
        optimizer_name: the parameter's name in the optimizer's state.
        owned: the optimizer of this rank updates the parameter.
        writer: this rank writes it into checkpoints (exactly one of the ranks with the same values does).
    """

    parameter: ParameterShard
    flat: tuple[int, int] | None
    optimizer_name: str
    owned: bool
    writer: bool

    @property
    def elements(self) -> int:
        """Number of the parameter's elements on this rank."""
        if self.flat is not None:
            return self.flat[1] - self.flat[0]
        return int(np.prod(self.parameter.slice.local_shape))

    @property
    def data(self) -> paddle.Tensor:
        """The weights on this rank, without the padding of stage 3."""
        parameter = self.parameter.tensor
        return parameter if self.flat is None else parameter.fw_storage._slice(0, self.elements)

    def remove_padding(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """Remove the padding of stage 3 from an optimizer state of this parameter."""
        return tensor if self.flat is None else tensor._slice(0, self.elements)

    def add_padding(self, values: np.ndarray) -> np.ndarray:
        """Add the padding of stage 3, whose slices all have the same length."""
        if self.flat is None:
            return values
        return np.pad(values, (0, self.parameter.tensor.fw_storage._numel() - len(values)))


class LocalShards:
    """The parameters on this rank that a checkpoint stores; iterating yields a LocalShard for each.

    Create it before the model is wrapped (stage 3 flattens the parameters), and bind() it afterwards.

    Args:
        model: this rank's model, not wrapped.
        trainable_only: leave out frozen parameters, which belong to the base model.
    """

    def __init__(self, model: nn.Layer, plan: ParallelPlan, *, trainable_only: bool) -> None:
        self._plan = plan
        self._shared = shared_between_stages(model)
        self.parameters = [h for h in parameter_shards(model) if not (trainable_only and h.tensor.stop_gradient)]
        self._wrapped: Any = None
        self._optimizer: Any = None

    def bind(self, wrapped: Any, optimizer: Any) -> None:
        """Set the wrapped model and optimizer, which know which rank updates which parameter."""
        self._wrapped, self._optimizer = wrapped, optimizer

    @property
    def optimizer(self) -> Any:
        """The paddle.optimizer.Optimizer inside Fleet's and PaddleNLP's wrappers."""
        optimizer = self._optimizer
        while True:
            inner = vars(optimizer).get("_inner_opt") or vars(optimizer).get("_optim")
            if inner is None or inner is optimizer:
                return optimizer
            optimizer = inner

    def check_names(self, store: ShardedStore) -> None:
        """Refuse a checkpoint with weights that this model lacks (a rank that holds some layers or experts can't tell).

        Raises:
            CheckpointError: naming the weights.
        """
        if self._plan.pipeline > 1 or self._plan.expert > 1:
            return
        extra = sorted(set(store.names()) - {parameter.name for parameter in self.parameters})
        if extra:
            shown = ", ".join(extra[:4]) + (", ..." if len(extra) > 4 else "")
            raise CheckpointError(
                f"{store.folder}: this run's model has no {shown}; resume with the configuration that wrote the "
                "checkpoint"
            )

    def __iter__(self) -> Iterator[LocalShard]:
        plan = self._plan
        at = plan.coordinates(rank())
        owners: dict[str, int] = {}  # parameter -> sharding rank that updates it; empty if all ranks update all
        if plan.sharding_strategy == "gradients":
            owners = dict(self._optimizer.param2rank)
        elif plan.sharding_strategy in ("optimizer", "gradients_hooked"):
            owners = dict(self._optimizer._inner_opt._param2rank)
        for i, shard in enumerate(self.parameters):
            parameter = shard.tensor
            if is_divided(parameter):
                copy, copies = plan.dataset_rank(rank()) // plan.expert, plan.replicas // plan.expert
                once = copy == i % copies and (shard.slice.axis is not None or at.tensor == 0)
                yield LocalShard(shard, None, parameter.name, True, once)
                continue
            once = (
                self._shared.get(parameter.name, True)
                and (shard.slice.axis is not None or at.tensor == 0)
                and at.data == i % plan.data
            )
            if plan.sharding_strategy == "parameters" and getattr(parameter, "fw_storage", None) is not None:
                yield LocalShard(shard, self._find_slice(parameter), f"{SLICE}{parameter.name}", True, once)
                continue
            owner = owners.get(parameter.name, i % plan.sharding)
            owned = at.sharding == owner if parameter.name in owners else True
            yield LocalShard(shard, None, parameter.name, owned, once and at.sharding == owner)

    def _find_slice(self, parameter: Any) -> tuple[int, int]:
        """This rank's range of a flattened parameter, without the padding that Fleet appends."""
        start, stop = self._wrapped._param2buffer[parameter.name][self._wrapped._rank]
        size = int(np.prod(parameter.shape))
        return min(start, size), min(stop, size)

    def tensors_to_write(self) -> Iterator[tuple[StoredShard, paddle.Tensor]]:
        """The weights and optimizer states that this rank writes into a checkpoint."""
        inner = self.optimizer
        for shard in self:
            if not shard.writer or not shard.elements:
                continue
            parameter = shard.parameter
            yield StoredShard(WEIGHTS, parameter.name, parameter.slice, shard.flat), shard.data
            names = (shard.optimizer_name, shard.optimizer_name + MASTER_NAME)
            for kind, table in inner._accumulators.items():
                tensor = next((table[name] for name in names if name in table), None)
                if tensor is None:
                    continue
                if tensor._numel() == 1 != shard.elements:  # powers of beta, one number per parameter
                    if shard.flat is None or shard.flat[0] == 0:
                        yield StoredShard(kind, parameter.name, TensorSlice(tuple(tensor.shape))), tensor
                    continue
                yield StoredShard(kind, parameter.name, parameter.slice, shard.flat), shard.remove_padding(tensor)
            master = inner._master_weights.get(shard.optimizer_name)
            if master is not None:
                yield StoredShard(MASTER, parameter.name, parameter.slice, shard.flat), shard.remove_padding(master)
