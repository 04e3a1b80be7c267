"""What Fleet's tensor, pipeline and sharding layers lack on a CPU, filled in from Python.

Each entry of PATCHES was written for Paddle 3.3.1; tests/rehearsal/test_patches.py shows what fails without it, and
fails itself when a newer Paddle no longer needs it. On a GPU nothing here is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import paddle
from paddle.base import core
from paddle.distributed import collective, parallel
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import tensor_parallel
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_storage
from paddle.distributed.fleet.utils import hybrid_parallel_util

from oarlock.cpu_ranks import tensor_parallel_ops


@dataclass(frozen=True)
class Patch:
    """One replaced name.

    Attributes:
        owners: modules or classes that hold the name.
        name: what is replaced.
        replacement: by what.
        why: what Paddle does on a CPU without it.
    """

    owners: tuple[Any, ...]
    name: str
    replacement: Any
    why: str

    def apply(self) -> None:
        """Replace the name wherever it was imported."""
        for owner in self.owners:
            setattr(owner, self.name, self.replacement)


def _broadcast_input_data(hcg: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
    """hybrid_parallel_util.broadcast_input_data without its check of the device."""
    place = paddle.CPUPlace()
    if inputs:
        inputs = hybrid_parallel_util._broadcast_nested_data(hcg, "cpu", place, inputs)
    if kwargs:
        kwargs = hybrid_parallel_util._broadcast_nested_data(hcg, "cpu", place, kwargs)
    return inputs, kwargs


def _synchronize(device: Any = None) -> None:
    """Nothing runs behind a CPU's back."""


def _add_rank_params_in_place(storage: Any, params: Any, param2align: Any, convert_gpu: bool = False) -> None:
    """group_sharded_storage.ParamStorage.add_rank_params without its way through the host."""
    _add_rank_params(storage, params, param2align, convert_gpu=False)


_add_rank_params = group_sharded_storage.ParamStorage.add_rank_params
_get_device = paddle.get_device

PATCHES: tuple[Patch, ...] = (
    Patch(
        (hybrid_parallel_util, tensor_parallel),
        "broadcast_input_data",
        _broadcast_input_data,
        "asserts that the device is a GPU, an XPU or a custom one",
    ),
    Patch((parallel.ParallelEnv,), "_device_id", 0, "is set only by builds for a device; PipelineLayer reads it"),
    Patch(
        (paddle._C_ops,),
        "c_identity",
        tensor_parallel_ops.identity,
        "has no CPU kernel; mp_ops calls it for identity forward and all-reduce backward",
    ),
    Patch(
        (paddle._legacy_C_ops,),
        "c_identity",
        tensor_parallel_ops.identity,
        "has no CPU kernel; ColumnParallelLinear calls it with enable_mp_async_allreduce",
    ),
    Patch(
        (paddle.device.cuda,),
        "synchronize",
        _synchronize,
        "raises in a build without CUDA; Fleet's timers call it (enable_timer)",
    ),
    Patch(
        (paddle.device,),
        "synchronize",
        _synchronize,
        "knows no CPU; PaddleNLP's Trainer calls it (enable_delay_scale_loss)",
    ),
    Patch((mp_ops, collective), "_c_concat", tensor_parallel_ops.concat, "the operator c_concat has no CPU kernel"),
    Patch((mp_ops, collective), "_c_split", tensor_parallel_ops.split, "the operator c_split has no CPU kernel"),
    Patch(
        (mp_ops, collective),
        "_c_softmax_with_cross_entropy",
        tensor_parallel_ops.softmax_with_cross_entropy,
        "the operator c_softmax_with_cross_entropy has no CPU kernel",
    ),
)

# For the constructors of Fleet's stage 2 and 3 wrappers alone.
BUILD_PATCHES: tuple[Patch, ...] = (
    Patch((core,), "is_compiled_with_cuda", lambda: True, "they assert a build for a GPU"),
    Patch((paddle,), "get_device", lambda: f"{_get_device()}:0", "stage 2 reads the device's number, as in gpu:0"),
    Patch(
        (group_sharded_storage.ParamStorage,),
        "add_rank_params",
        _add_rank_params_in_place,
        "copies parameters to the device by way of the host, which on a CPU frees them before they are read",
    ),
)


def install() -> None:
    """Apply PATCHES; twice does no harm."""
    for patch in PATCHES:
        patch.apply()


@contextlib.contextmanager
def building_group_sharded() -> Iterator[None]:
    """While Fleet's stage 2 and 3 wrappers are built on a CPU: let them take it for a device they know."""
    with contextlib.ExitStack() as stack:
        for patch in BUILD_PATCHES:
            for owner in patch.owners:
                stack.enter_context(mock.patch.object(owner, patch.name, patch.replacement))
        yield
