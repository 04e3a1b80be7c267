"""Fleet's wrappers around a model and its optimizer, as the plan says."""

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

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer

# Fleet's defaults: gradients are reduced in buckets of 8M elements, and stage 3 slices parameters from 1M elements on.
BUCKET_ELEMENTS = 2**23
_SLICED_ELEMENTS = 2**20


def wrap_group_sharded(trainer: OarlockTrainer, model: nn.Layer) -> nn.Layer:
    """Stage 2 or 3 without pipeline; replaces trainer.optimizer.

    The Trainer's own way asserts a GPU (through group_sharded_parallel) and refuses stage 3 with tensor parallel.
    """
    plan, args = trainer.plan, trainer.args
    optimizer = trainer.optimizer
    if trainer.do_grad_scaling:
        model, optimizer = paddle.amp.decorate(
            models=model, optimizers=optimizer, level=args.fp16_opt_level, dtype=trainer.amp_dtype
        )
    hcg = fleet.get_hybrid_communicate_group()
    if plan.sequence_parallel:  # sums the gradients of norms, which each tensor rank has for its part of the sequence
        register_sequence_parallel_allreduce_hooks(model, args.gradient_accumulation_steps, False)
    if plan.tensor > 1:
        model = TensorParallel(model, hcg, strategy=None)
    if args.amp_master_grad:
        mix_precision_utils.MixPrecisionLayer(model, dtype=trainer.amp_dtype)
        optimizer = mix_precision_utils.MixPrecisionOptimizer(optimizer)
    device = paddle.get_device().split(":")[0]
    common: dict[str, Any] = {
        "group": hcg.get_sharding_parallel_group(),
        "dp_group": hcg.get_data_parallel_group() if plan.data > 1 else None,
        "device": device,
    }
    with _building(device):
        if plan.sharding_strategy == "gradients":
            optimizer = GroupShardedOptimizerStage2(params=optimizer._parameter_list, optim=optimizer, **common)
            model = GroupShardedStage2(model, optimizer, buffer_max_size=BUCKET_ELEMENTS, **common)
        else:
            segment = trainer.config.parallel.stage3_min_elements or _SLICED_ELEMENTS
            model = GroupShardedStage3(model, optimizer=optimizer, segment_size=segment, **common)
    trainer.optimizer = optimizer
    return model


def _building(device: str) -> contextlib.AbstractContextManager[None]:
    if device != "cpu":
        return contextlib.nullcontext()
    from oarlock.cpu_ranks.fleet_patches import building_group_sharded

    return building_group_sharded()
