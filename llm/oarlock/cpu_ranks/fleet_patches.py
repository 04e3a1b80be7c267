"""What Fleet's tensor, pipeline and sharding layers need on a CPU. On a GPU nothing of this is used.

The table is oarlock.compat.patches, which says why each patch is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import paddle
from paddle.distributed.fleet.utils import hybrid_parallel_util

from oarlock.compat.patch import AppliedPatches, patched
from oarlock.compat.patches import list_patches

DEVICE_ID = 0  # of ParallelEnv
_applied = AppliedPatches()


def broadcast_input_data(hcg: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
    """hybrid_parallel_util.broadcast_input_data without its check of the device."""
    place = paddle.CPUPlace()
    if inputs:
        inputs = hybrid_parallel_util._broadcast_nested_data(hcg, "cpu", place, inputs)
    if kwargs:
        kwargs = hybrid_parallel_util._broadcast_nested_data(hcg, "cpu", place, kwargs)
    return inputs, kwargs


def synchronize(device: Any = None) -> None:
    """Do nothing: a CPU has no streams to wait for."""


def return_true() -> bool:
    return True


def numbered_device(get_device: Callable[[], str]) -> Callable[[], str]:
    """paddle.get_device with a device number."""
    return lambda: f"{get_device()}:0"


def add_rank_params_in_place(add_rank_params: Callable[..., None]) -> Callable[..., None]:
    """ParamStorage.add_rank_params without the copy by way of the host."""

    def add(storage: Any, params: Any, param2align: Any, convert_gpu: bool = False) -> None:
        add_rank_params(storage, params, param2align, convert_gpu=False)

    return add


def install() -> None:
    """Make Fleet's layers work on CPUs; a second call does nothing."""
    if not _applied:
        _applied.apply(list_patches(__name__))


def building_group_sharded() -> contextlib.AbstractContextManager[None]:
    """Make the constructors of Fleet's stage 2 and 3 wrappers accept a CPU, for the duration of a block."""
    return patched(list_patches(__name__, "while_building"))
