"""Collectives over Python objects, and running an action on all ranks without leaving one behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from oarlock.environment.ranks import rank, world_size
from oarlock.errors import StoppedWithOthers


def all_gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value (a small Python object), in rank order.

    Args:
        group: Paddle's group of the ranks; None for all ranks.
    """
    if world_size() <= 1:
        return [value]
    import paddle.distributed

    values: list[Any] = []
    paddle.distributed.all_gather_object(values, value, group=group)
    return values


def run_on_all_ranks(action: Callable[[], object], first_rank_only: bool = False) -> None:
    """Run an action on every rank (or on rank 0), then check that it succeeded everywhere.

    Raises:
        OarlockError: the action's error, on the first rank that failed.
        StoppedWithOthers: on the other ranks.
    """
    error: Exception | None = None
    if rank() == 0 or not first_rank_only:
        try:
            action()
        except Exception as raised:
            error = raised
    raise_on_all_ranks(error, all_gather_objects(error is not None))


def raise_on_all_ranks(error: Exception | None, failed: Sequence[bool]) -> None:
    """Raise this rank's error if it is the first rank that failed, and StoppedWithOthers if another is.

    Args:
        failed: whether each rank failed, in rank order.
    """
    if not any(failed):
        return
    first = failed.index(True)
    if error is not None and rank() == first:
        raise error
    raise StoppedWithOthers(f"rank {first} failed")
