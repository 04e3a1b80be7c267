"""Which ranks share a machine, and collectives over objects before process groups exist.

Ranks of one machine communicate through shared memory (oarlock.cpu_ranks.rendezvous). Ranks of several machines, which
train on GPUs, also use Paddle's store, which trusts every client that can reach its port. So values from the store are
validated, and never name a file.
"""

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
from typing import TYPE_CHECKING, Any, TypeVar

from oarlock.cpu_ranks.failure_detector import MAX_SHARED_BYTES, CommunicationError
from oarlock.environment.ranks import local_world_size, rank, world_size
from oarlock.formats.json_file import parse_json
from oarlock.parallel.object_collectives import all_gather_objects, raise_on_all_ranks

if TYPE_CHECKING:
    from oarlock.cpu_ranks.rendezvous import ConnectedRanks

T = TypeVar("T")
_POLL_S = 0.02
_START_S = 600.0  # for the ranks of a machine to start
_calls = itertools.count()  # all ranks make the same calls in the same order


@dataclass(frozen=True)
class Node:
    """The ranks of this run that share a machine.

    Attributes:
        ranks: global ranks, ascending. The first one reads files for all.
        group: Paddle's group of these ranks; None for all ranks.
    """

    ranks: tuple[int, ...]
    group: Any = None

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads files for its node."""
        return rank() == self.ranks[0]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The value (a small Python object) of every rank of this node, in rank order."""
        return [value] if len(self.ranks) == 1 else all_gather_objects(value, self.group)


@functools.cache
def find_node() -> Node:
    """The node of this rank. All ranks must call this at the same time."""
    if world_size() <= 1:
        return Node((rank(),))
    nodes = group_ranks_by_node(all_gather_objects(make_node_key()))
    found = Node(tuple(range(world_size())))
    if len(nodes) == 1:
        return found
    import paddle.distributed

    for ranks in nodes:
        group = paddle.distributed.new_group(ranks)  # every rank must create every group
        if rank() in ranks:
            found = Node(tuple(ranks), group)
    return found


def make_node_key() -> tuple[str, int | None]:
    """A key that the ranks of one launcher on one host share. Two launchers on a host are two nodes."""
    in_node = os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_LOCAL_RANK", ""))
    return socket.gethostname(), rank() - int(in_node) if in_node.isdigit() else None


def group_ranks_by_node(keys: Sequence[Hashable]) -> list[list[int]]:
    """The ranks grouped by key, in the order of each group's first rank."""
    nodes: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        nodes[key].append(i)
    return list(nodes.values())


def all_gather_objects_early(value: Any) -> list[Any]:
    """Every rank's value (JSON), in rank order. Needs no process groups, and has no timeout.

    Raises:
        CommunicationError: the value of a rank is too long, or not JSON.
    """
    if world_size() <= 1:
        return [value]
    text, here, run = json.dumps(value), _ranks_in_memory(), _connected_ranks()
    texts: list[str | bytes] = list(run.all_gather_objects(text)) if run else [text]
    if len(here) < world_size():
        everywhere = _gather_through_store(text)
        everywhere[here.start : here.stop] = texts
        texts = everywhere
    return [_parse(i, each) for i, each in enumerate(texts)]


def _ranks_in_memory() -> range:
    """The ranks that share memory with this one: those of one launcher, or all ranks on a CPU."""
    from oarlock.cpu_ranks.process_group import current_run

    if current_run():
        return range(world_size())
    in_node = os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_LOCAL_RANK", ""))
    count = local_world_size()
    if not in_node.isdigit() or not 0 <= rank() - int(in_node) <= world_size() - count or int(in_node) >= count:
        return range(rank(), rank() + 1)
    return range(rank() - int(in_node), rank() - int(in_node) + count)


@functools.cache
def _connected_ranks() -> ConnectedRanks | None:
    from oarlock.cpu_ranks.meeting_point import meeting_point
    from oarlock.cpu_ranks.process_group import current_run
    from oarlock.cpu_ranks.rendezvous import join_ranks

    here = _ranks_in_memory()
    if current_run() or len(here) == 1:
        return current_run()
    part = f"ranks {here.start} to {here.stop - 1}" if len(here) < world_size() else ""
    return join_ranks(meeting_point(part), rank() - here.start, len(here), _START_S)


def _gather_through_store(text: str) -> list[str | bytes]:
    from paddle.base import core

    store = core.create_or_get_global_tcp_store()
    prefix = f"oarlock/shared/{next(_calls)}"
    store.set(f"{prefix}/{rank()}", text)
    store.add(f"{prefix}/{rank()}/set", 1)
    values = []
    for i in range(world_size()):
        while store.add(f"{prefix}/{i}/set", 0) < 1:  # get() has a timeout of 15 minutes
            time.sleep(_POLL_S)
        values.append(store.get(f"{prefix}/{i}"))
    store.add(f"{prefix}/read", 1)
    while rank() == 0 and store.add(f"{prefix}/read", 0) < world_size():  # the store ends with rank 0
        time.sleep(_POLL_S)
    return values


def _parse(i: int, text: str | bytes) -> Any:
    if isinstance(text, bytes):  # from Paddle's store
        return parse_json(text, f"the object of rank {i}", error=CommunicationError, limit=MAX_SHARED_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommunicationError(f"the object of rank {i} can't be read: {error}") from error


def run_on_all_ranks_early(action: Callable[[], T]) -> T:
    """Run an action on every rank and check that it succeeded everywhere. Needs no process groups, has no timeout.

    Raises:
        OarlockError: the action's error, on the first rank that failed.
        StoppedWithOthers: on the other ranks.
    """
    value, error = _try_action(action)
    raise_on_all_ranks(error, _flags(all_gather_objects_early(error is not None)))
    return value


def run_once_per_node(action: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Run an action on the first rank of every node, while the others wait. Needs no process groups, has no timeout.

    Returns:
        The result (JSON) on this node, and the results of all nodes in order. Those of other nodes may have come over
        a network: compare them, but don't trust them.

    Raises:
        OarlockError: the action's error, on the first rank that failed.
        StoppedWithOthers: on the other ranks.
    """
    host, first = make_node_key()
    if first is None and len(_ranks_in_memory()) == 1:  # the launcher does not say which ranks share a machine
        first = rank()
    nodes = group_ranks_by_node([_key(i, key) for i, key in enumerate(all_gather_objects_early([host, first]))])
    mine = next(ranks for ranks in nodes if rank() in ranks)
    if not set(mine) <= set(_ranks_in_memory()):
        raise CommunicationError(
            f"ranks {mine} report that they share a machine, but ranks {list(_ranks_in_memory())} do"
        )
    value, error = _try_action(action) if rank() == mine[0] else (None, None)
    results = [_pair(i, result) for i, result in enumerate(all_gather_objects_early([error is not None, value]))]
    raise_on_all_ranks(error, _flags([failed for failed, _ in results]))
    return results[mine[0]][1], [results[ranks[0]][1] for ranks in nodes]


def _key(i: int, key: Any) -> tuple[str, int | None]:
    host, first = _pair(i, key)
    if not isinstance(host, str) or not (first is None or type(first) is int):
        raise CommunicationError(f"rank {i} does not report where it runs")
    return host, first


def _pair(i: int, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CommunicationError(f"rank {i} sends an object of another form than the others")
    return value[0], value[1]


def _flags(values: Sequence[Any]) -> list[bool]:
    for i, value in enumerate(values):
        if type(value) is not bool:
            raise CommunicationError(f"rank {i} sends an object of another form than the others")
    return list(values)


def _try_action(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
