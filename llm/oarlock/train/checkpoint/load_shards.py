"""Loads a checkpoint, written under any plan, into this rank's shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle

from oarlock.models.build import set_parameter
from oarlock.train.checkpoint.local_shards import MASTER_NAME, LocalShards
from oarlock.train.checkpoint.resume import ResumePoint
from oarlock.weights.layout import ParameterShard
from oarlock.weights.shard_index import MASTER, WEIGHTS
from oarlock.weights.sharded_store import ShardedStore


def load_weights(shards: LocalShards, checkpoint: Path) -> None:
    """Load every parameter of this rank before the model is wrapped.

    Raises:
        CheckpointError: if the model and the checkpoint don't have the same weights.
    """
    with ShardedStore.open(checkpoint) as store:
        shards.check_names(store)
        for parameter in shards.parameters:
            set_parameter(
                parameter.tensor, store.read_slice(_choose_kind(parameter, store), parameter.name, parameter.slice)
            )


def reload_weights(shards: LocalShards, checkpoint: Path) -> None:
    """Load the weights after the model is wrapped. The optimizer states don't change, so training can't continue."""
    with ShardedStore.open(checkpoint) as store:
        for shard in shards:
            parameter = shard.parameter
            values = store.read_slice(_choose_kind(parameter, store), parameter.name, parameter.slice, shard.flat)
            target = parameter.tensor if shard.flat is None else parameter.tensor.fw_storage
            set_parameter(target, shard.add_padding(values))


def _choose_kind(parameter: ParameterShard, store: ShardedStore) -> str:
    """Choose the master weights of a half-precision run for float32 parameters, the weights otherwise."""
    exact = parameter.tensor.dtype == paddle.float32 and f"{MASTER}/{parameter.name}" in store.where
    return MASTER if exact else WEIGHTS


def load_training_state(shards: LocalShards, resume: ResumePoint, lr_scheduler: Any, scaler: Any) -> None:
    """Load optimizer states, learning rate and loss scaling, after the model is wrapped.

    Args:
        scaler: GradScaler of fp16 loss scaling, or None.
    """
    manifest = resume.manifest
    with ShardedStore.open(resume.folder) as store:
        inner = shards.optimizer
        kinds = [kind for kind in store.kinds if kind not in (WEIGHTS, MASTER)]
        state: dict[str, Any] = {"LR_Scheduler": manifest.lr_scheduler}  # without it, the optimizer accepts no states
        masters: dict[str, Any] = {}
        for shard in shards:
            parameter, name = shard.parameter, shard.optimizer_name
            if not shard.owned or parameter.tensor.stop_gradient:
                continue
            half = parameter.tensor.dtype in (paddle.float16, paddle.bfloat16)
            multi_precision = half and getattr(inner, "_multi_precision", False)
            for kind in kinds:
                if f"{kind}/{parameter.name}" not in store.where:
                    continue
                if store.shape(kind, parameter.name) != parameter.slice.shape:
                    values = store.read(parameter.name, kind)
                else:
                    values = shard.add_padding(store.read_slice(kind, parameter.name, parameter.slice, shard.flat))
                key = f"{name}{MASTER_NAME if multi_precision else ''}_{kind}_0"
                state[key] = paddle.to_tensor(values)
            if multi_precision and f"{MASTER}/{parameter.name}" in store.where:
                values = store.read_slice(MASTER, parameter.name, parameter.slice, shard.flat)
                masters[name] = paddle.to_tensor(shard.add_padding(values))
        if masters:
            state["master_weights"] = masters
        inner.set_state_dict(state)
    lr_scheduler.set_state_dict(manifest.lr_scheduler)
    lr_scheduler.step(lr_scheduler.last_epoch)  # the rate of this run's schedule, not the stored one
    if scaler is not None and manifest.loss_scaler:
        scaler.load_state_dict({name: np.asarray(value) for name, value in manifest.loss_scaler.items()})
