"""The process groups of expert parallelism, which Fleet does not make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oarlock.environment.ranks import rank

if TYPE_CHECKING:
    from oarlock.parallel.plan import ParallelPlan


@dataclass(frozen=True)
class ExpertGroups:
    """How this rank's experts are divided.

    Attributes:
        degree: number of ranks that divide a layer's experts among them.
        rank: this rank's place among them. It holds the experts from rank * experts / degree on.
        exchange: Paddle's group of these ranks, which send each other tokens; None if there is only this one.
        copies: Paddle's group of the ranks that hold the same experts; None if there is only this one.
    """

    degree: int = 1
    rank: int = 0
    exchange: Any = None
    copies: Any = None


_NO_GROUPS = ExpertGroups()
_current = _NO_GROUPS


def make_expert_groups(plan: ParallelPlan) -> None:
    """Make the groups of a plan. Every rank has to call it, after Fleet made its own."""
    global _current
    _current = _NO_GROUPS
    if plan.expert == 1:
        return
    import paddle.distributed as dist

    # Paddle makes a group only if all ranks ask for it, and in the same order.
    exchange, copies = (
        [(ranks, dist.new_group(ranks) if len(ranks) > 1 else None) for ranks in groups]
        for groups in (plan.expert_groups(), plan.expert_copies())
    )
    mine = rank()
    ranks, group = next(each for each in exchange if mine in each[0])
    of_copies = next(group for ranks, group in copies if mine in ranks)
    _current = ExpertGroups(plan.expert, ranks.index(mine), group, of_copies)


def find_expert_groups() -> ExpertGroups:
    """The groups of this run; one rank holds all experts if the plan does not divide them."""
    return _current
