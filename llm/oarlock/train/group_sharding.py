"""Sharding of gradients and parameters (stages 2 and 3) by Fleet's wrappers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import TensorParallel
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import GroupShardedOptimizerStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import GroupShardedStage3
from paddle.distributed.fleet.utils import mix_precision_utils
from paddle.distributed.fleet.utils.sequence_parallel_utils import register_sequence_parallel_allreduce_hooks

from oarlock.parallel.sharded_gradients import ShardedGradients
from oarlock.weights.layout import shared_between_stages

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.parallel.plan import ParallelPlan

# Fleet's defaults: gradients are reduced in buckets of 8M elements, and stage 3 slices parameters from 1M elements.
_BUCKET_ELEMENTS = 2**23
_SLICED_ELEMENTS = 2**20


def wrap_group_sharded(model: nn.Layer, optimizer: Any, plan: ParallelPlan, config: RunConfig) -> tuple[nn.Layer, Any]:
    """Wrap a model and its optimizer for stage 2 or 3 without pipeline.

    The Trainer's own way asserts a GPU (through group_sharded_parallel) and refuses stage 3 with tensor parallel.

    Returns:
        The wrapped model and the wrapped optimizer.
    """
    precision = config.precision
    dtype = "float16" if precision.fp16 else "bfloat16"
    if precision.fp16:
        model, optimizer = paddle.amp.decorate(
            models=model, optimizers=optimizer, level=precision.fp16_opt_level, dtype=dtype
        )
    hcg = fleet.get_hybrid_communicate_group()
    if plan.sequence_parallel:  # sums the gradients of norms over tensor ranks
        register_sequence_parallel_allreduce_hooks(model, config.batch.gradient_accumulation_steps, False)
    if plan.tensor > 1:
        model = TensorParallel(model, hcg, strategy=None)
    if precision.amp_master_grad:
        mix_precision_utils.MixPrecisionLayer(model, dtype=dtype)
        optimizer = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    device = paddle.get_device().split(":")[0]
    common: dict[str, Any] = {
        "group": hcg.get_sharding_parallel_group(),
        "dp_group": hcg.get_data_parallel_group() if plan.data > 1 else None,
        "device": device,
    }
    with _patch_fleet_for(device):
        if plan.sharding_strategy == "gradients":
            optimizer = GroupShardedOptimizerStage2(params=optimizer._parameter_list, optim=optimizer, **common)
            model = GroupShardedStage2(model, optimizer, buffer_max_size=_BUCKET_ELEMENTS, **common)
        else:
            segment = config.parallel.stage3_min_elements or _SLICED_ELEMENTS
            model = GroupShardedStage3(model, optimizer=optimizer, segment_size=segment, **common)
    return model, optimizer


def shard_pipeline_gradients(model: nn.Layer, optimizer: Any) -> ShardedGradients:
    """Shard the gradients of a pipeline (stage 2), whose optimizer is wrapped for stage 1.

    Args:
        model: this rank's model, not wrapped.
    """
    hcg = fleet.get_hybrid_communicate_group()
    return ShardedGradients(optimizer._inner_opt, hcg, _BUCKET_ELEMENTS, shared_between_stages(model))


def _patch_fleet_for(device: str) -> contextlib.AbstractContextManager[None]:
    if device != "cpu":
        return contextlib.nullcontext()
    from oarlock.cpu_ranks.fleet_patches import building_group_sharded

    return building_group_sharded()
