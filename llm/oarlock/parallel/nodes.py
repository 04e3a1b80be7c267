"""Which ranks share a machine, and sharing small values before there are groups (through Paddle's store)."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from oarlock.environment import rank, world_size
from oarlock.errors import StoppedWithOthers
from oarlock.parallel.sync import share

_POLL_S = 0.02
_calls = itertools.count()  # all ranks make the same calls in the same order


@dataclass(frozen=True)
class Node:
    """The ranks of this run that share a machine.

    Attributes:
        ranks: global, ascending; the first one reads.
        group: Paddle's group of them; None for the group of all ranks.
    """

    ranks: tuple[int, ...]
    group: Any = None

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        return rank() == self.ranks[0]

    def share(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order (small Python objects)."""
        if len(self.ranks) == 1:
            return [value]
        import paddle.distributed

        values: list[Any] = []
        paddle.distributed.all_gather_object(values, value, group=self.group)
        return values


@functools.cache
def this_node() -> Node:
    """The node of this rank; every rank has to call it at the same time."""
    if world_size() <= 1:
        return Node((rank(),))
    nodes = ranks_by_node(share(node_key()))
    found = Node(tuple(range(world_size())))
    if len(nodes) == 1:
        return found
    import paddle.distributed

    for ranks in nodes:
        group = paddle.distributed.new_group(ranks)  # by all ranks, members or not
        if rank() in ranks:
            found = Node(tuple(ranks), group)
    return found


def node_key() -> tuple[str, int | None]:
    """The same for the ranks of one launcher on one host, so that two launchers on a host are two nodes."""
    in_node = os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_LOCAL_RANK", ""))
    return socket.gethostname(), rank() - int(in_node) if in_node.isdigit() else None


def ranks_by_node(keys: Sequence[Hashable]) -> list[list[int]]:
    """Ranks grouped by the keys they gave, in the order of their first ranks."""
    nodes: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        nodes[key].append(i)
    return list(nodes.values())


def share_through_store(value: Any) -> list[Any]:
    """Every rank's value (JSON), in rank order, also before the groups are made. Waits as long as it takes."""
    if world_size() <= 1:
        return [value]
    from paddle.base import core

    store = core.create_or_get_global_tcp_store()
    prefix = f"oarlock/shared/{next(_calls)}"
    store.set(f"{prefix}/{rank()}", json.dumps(value))
    store.add(f"{prefix}/{rank()}/set", 1)
    values = []
    for i in range(world_size()):
        while store.add(f"{prefix}/{i}/set", 0) < 1:  # get() would give up after a quarter of an hour
            time.sleep(_POLL_S)
        values.append(json.loads(store.get(f"{prefix}/{i}")))
    store.add(f"{prefix}/read", 1)
    while rank() == 0 and store.add(f"{prefix}/read", 0) < world_size():  # the store ends with rank 0
        time.sleep(_POLL_S)
    return values


def first_of_node() -> bool:
    """Whether this rank is the first that its launcher started on this machine."""
    return node_key()[1] in (None, rank())


def once_per_node(action: Callable[[], Any]) -> list[Any]:
    """Run an action on the first rank of every node, the others wait as long as it takes; JSON values, node by node.

    Raises:
        OarlockError: on the first rank that failed, with its message; on the others StoppedWithOthers.
    """
    value, error = None, None
    if first_of_node():
        try:
            value = action()
        except Exception as raised:
            error = raised
    results = share_through_store([first_of_node(), error is not None, value])
    failures = [i for i, (_, failed, _) in enumerate(results) if failed]
    if not failures:
        return [found for first, _, found in results if first]
    if error is not None and rank() == failures[0]:
        raise error
    raise StoppedWithOthers(f"rank {failures[0]} failed")
