"""Doing things once, or all together, without a rank being left behind when another fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oarlock.environment.ranks import rank, world_size
from oarlock.errors import StoppedWithOthers


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        import paddle.distributed

        paddle.distributed.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order (small Python objects)."""
    if world_size() <= 1:
        return [value]
    import paddle.distributed

    values: list[Any] = []
    paddle.distributed.all_gather_object(values, value)
    return values


def run_on_all_ranks(action: Callable[[], None], first_rank_only: bool = False) -> None:
    """Run an action on every rank (or on rank 0), then make sure that it worked everywhere.

    Raises:
        OarlockError: on the first rank that failed, with its message; on the others StoppedWithOthers.
    """
    error: Exception | None = None
    if rank() == 0 or not first_rank_only:
        try:
            action()
        except Exception as raised:
            error = raised
    failures = [i for i, failed in enumerate(all_gather_objects(error is not None)) if failed]
    if not failures:
        return
    if error is not None and rank() == failures[0]:
        raise error
    raise StoppedWithOthers(f"rank {failures[0]} failed")
