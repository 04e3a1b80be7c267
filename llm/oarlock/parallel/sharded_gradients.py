"""Sharding stage 2 under a pipeline, which PaddleNLP refuses: only its owner accumulates the gradient of a parameter.

Fleet's DygraphShardingOptimizer (stage 1) assigns every parameter to a sharding rank, its owner, but keeps all
gradients on all ranks until the step. Here the gradients of each micro-batch are reduced to their owners, bucket by
bucket, during its backward pass. The owner adds them up, and the other ranks free them. So a rank stores the gradients
of the parameters that it owns, 1 / sharding degree of all. One reduce per bucket moves the same bytes as a
reduce-scatter. See ZeRO stage 2, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor


@dataclass
class _Bucket:
    """Parameters of one owner whose gradients are reduced together.

    Attributes:
        owner: rank in the sharding group.
        accumulated: on the owner, the flat sum of the gradients of the micro-batches so far.
        arrived: names of the parameters whose gradient of this micro-batch is available.
    """

    owner: int
    parameters: list[Tensor] = field(default_factory=list)
    accumulated: Tensor | None = None
    arrived: set[str] = field(default_factory=set)

    @property
    def elements(self) -> int:
        return sum(p._numel() for p in self.parameters)


class ShardedGradients:
    """Shards the gradients of a DygraphShardingOptimizer.

    Fleet sums the gradients of parameters that pipeline stages share (tied embeddings) after the last micro-batch.
    Until then these gradients are not sharded.

    Args:
        optimizer: a DygraphShardingOptimizer. Its reduce_gradients, clear_grad and _sharding_sync_parameters are
            replaced.
        hcg: Fleet's HybridCommunicateGroup.
        bucket_elements: number of gradient elements that are reduced at once.
        shared: names of the parameters that other pipeline stages have too.
    """

    def __init__(self, optimizer: Any, hcg: Any, bucket_elements: int, shared: Collection[str]) -> None:
        self.group = hcg.get_sharding_parallel_group()
        self.rank: int = self.group.rank
        self._optimizer = optimizer
        trainable = [p for p in optimizer._parameter_list if not p.stop_gradient]
        self._main_grad = any(hasattr(p, "main_grad") for p in trainable)
        self._shared = [_Bucket(optimizer._param2rank[p.name], [p]) for p in trainable if p.name in shared]
        # Buckets of one owner and dtype each. Gradients are computed in about the reverse order of the parameters, so
        # buckets become complete one by one.
        self._buckets: list[_Bucket] = []
        open_buckets: dict[tuple[int, Any], _Bucket] = {}
        for parameter in reversed(trainable):
            if parameter.name in shared:
                continue
            key = optimizer._param2rank[parameter.name], parameter.dtype
            bucket = open_buckets.get(key)
            if bucket is None or bucket.elements + parameter._numel() > bucket_elements:
                bucket = open_buckets[key] = _Bucket(key[0])
                self._buckets.append(bucket)
            bucket.parameters.append(parameter)
        self._pending: tuple[Any, _Bucket, Tensor] | None = None
        self.largest_message = 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter._register_backward_hook(self._hook(bucket, parameter.name))
        optimizer.reduce_gradients = lambda *_: None  # done by finish(), before fp16 gradients are unscaled
        optimizer.clear_grad = self.clear
        optimizer._sharding_sync_parameters = self._broadcast_parameters

    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank stores between micro-batches."""
        kept = [bucket.accumulated for bucket in self._buckets if bucket.accumulated is not None]
        unsharded = [grad for bucket in self._shared for p in bucket.parameters if (grad := self._grad(p)) is not None]
        return sum(tensor._numel() * tensor.element_size() for tensor in (*kept, *unsharded))

    def _hook(self, bucket: _Bucket, name: str) -> Callable[..., None]:
        @paddle.no_grad()
        def arrive(*_: Any) -> None:
            bucket.arrived.add(name)
            if len(bucket.arrived) == len(bucket.parameters):
                self._reduce(bucket)

        return arrive

    def _reduce(self, bucket: _Bucket) -> None:
        """Start the reduction of a bucket to its owner, and free the gradients."""
        self._wait_for_pending()
        grads = ((self._grad(p), p) for p in bucket.parameters)
        flat = paddle.concat([(self._zeros(p) if grad is None else grad).flatten() for grad, p in grads])
        for parameter in bucket.parameters:
            self._drop_grad(parameter)
        bucket.arrived.clear()
        flat.scale_(1.0 / self.group.nranks)
        self.largest_message = max(self.largest_message, flat._numel() * flat.element_size())
        task = dist.reduce(flat, dst=self.group.ranks[bucket.owner], group=self.group, sync_op=False)
        self._pending = task, bucket, flat

    def _wait_for_pending(self) -> None:
        """Wait for the pending reduction, which runs during the next layers' backward pass, and add up its result."""
        if self._pending is None:
            return
        task, bucket, flat = self._pending
        self._pending = None
        if task is not None:
            task.wait()
        if bucket.owner == self.rank:
            if bucket.accumulated is None:
                bucket.accumulated = flat
            else:
                bucket.accumulated.add_(flat)

    @paddle.no_grad()
    def finish(self) -> None:
        """Set the gradients of the parameters that this rank owns. Call this after the last micro-batch of a step."""
        incomplete = [bucket for bucket in self._buckets if bucket.arrived]
        for bucket in (*incomplete, *self._shared):  # a bucket waits for parameters that got no gradient
            self._reduce(bucket)
        self._wait_for_pending()
        for bucket in (*self._buckets, *self._shared):
            if bucket.owner != self.rank:
                continue
            begin = 0
            for parameter in bucket.parameters:
                end = begin + parameter._numel()
                if bucket.accumulated is None:  # no gradient in this step
                    grad = self._zeros(parameter)
                else:
                    grad = bucket.accumulated._slice(begin, end).reshape(parameter.shape)
                setattr(parameter, "main_grad" if self._main_grad else "grad", grad)
                begin = end

    def clear(self, set_to_zero: bool = True) -> None:
        """Replaces clear_grad: free all gradients after the step."""
        for bucket in (*self._buckets, *self._shared):
            for parameter in bucket.parameters:
                self._drop_grad(parameter)
            bucket.accumulated = None

    @paddle.no_grad()
    def _broadcast_parameters(self) -> None:
        """Replaces _sharding_sync_parameters, which skips parameters that have no gradient on this rank."""
        tasks = [
            dist.broadcast(p, src=self.group.ranks[bucket.owner], group=self.group, sync_op=False)
            for bucket in (*self._buckets, *self._shared)
            for p in bucket.parameters
        ]
        for task in tasks:
            if task is not None:
                task.wait()

    # amp_master_grad stores float32 gradients as main_grad (mix_precision_utils.MixPrecisionLayer)

    def _grad(self, parameter: Tensor) -> Tensor | None:
        return parameter.main_grad if self._main_grad else parameter.grad

    def _zeros(self, parameter: Tensor) -> Tensor:
        return paddle.zeros(parameter.shape, paddle.float32 if self._main_grad else parameter.dtype)

    def _drop_grad(self, parameter: Tensor) -> None:
        if self._main_grad:
            parameter.main_grad = None
        else:
            parameter.clear_gradient(False)
