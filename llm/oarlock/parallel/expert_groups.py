"""The process groups of expert parallelism, which Fleet does not make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oarlock.environment.ranks import rank

if TYPE_CHECKING:
    from oarlock.parallel.plan import ParallelPlan


@dataclass(frozen=True)
class ExpertGroups:
    """Paddle's groups of this rank.

    Attributes:
        exchange: the ranks that divide the experts of a layer among them, and send each other tokens.
        copies: the ranks that hold the same experts; None if there is only this one.
    """

    exchange: Any
    copies: Any


_current: ExpertGroups | None = None


def make_expert_groups(plan: ParallelPlan) -> None:
    """Make the groups of a plan. Every rank has to call it, after Fleet made its own."""
    global _current
    _current = None
    if plan.expert > 1:
        _current = ExpertGroups(_make_groups(plan.expert_groups()), _make_groups(plan.expert_copies()))


def find_expert_groups() -> ExpertGroups | None:
    """The groups of this run; None if its plan does not divide experts."""
    return _current


def _make_groups(groups: Sequence[Sequence[int]]) -> Any:
    """Make groups of several ranks each; returns the one with this rank, if any."""
    import paddle.distributed as dist

    mine = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks))  # on all ranks, in the same order
            mine = group if rank() in ranks else mine
    return mine
