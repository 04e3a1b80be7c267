"""Which ranks share a machine, and sharing small values before there are groups.

Ranks of one machine share them through memory that they have handed each other (see oarlock.cpu_ranks.rendezvous).
Those
of several machines, who train on GPUs, share them through Paddle's store as well, which believes everyone who can reach
its port: what comes from there is counted and compared, and chooses no file.
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
from oarlock.errors import StoppedWithOthers
from oarlock.formats.json_file import parse_json
from oarlock.parallel.object_collectives import all_gather_objects

if TYPE_CHECKING:
    from oarlock.cpu_ranks.rendezvous import ConnectedRanks

T = TypeVar("T")
_POLL_S = 0.02
_START_S = 600.0  # for the ranks of a machine to meet
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

    def all_gather_objects(self, value: Any) -> list[Any]:
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
    nodes = ranks_by_node(all_gather_objects(node_key()))
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


def share_early(value: Any) -> list[Any]:
    """Every rank's value (JSON), in rank order, also before the groups are made. Waits as long as it takes.

    Raises:
        CommunicationError: what a rank shares is too long, or no JSON.
    """
    if world_size() <= 1:
        return [value]
    text, here, run = json.dumps(value), _here(), _run_here()
    texts: list[str | bytes] = list(run.all_gather_objects(text)) if run else [text]
    if len(here) < world_size():
        everywhere = _share_through_store(text)
        everywhere[here.start : here.stop] = texts
        texts = everywhere
    return [_parse(i, each) for i, each in enumerate(texts)]


def _here() -> range:
    """The ranks of this machine that meet in memory: those of one launcher, on a CPU all."""
    from oarlock.cpu_ranks.process_group import current_run

    if current_run():
        return range(world_size())
    in_node = os.environ.get("PADDLE_RANK_IN_NODE", os.environ.get("PADDLE_LOCAL_RANK", ""))
    count = local_world_size()
    if not in_node.isdigit() or not 0 <= rank() - int(in_node) <= world_size() - count or int(in_node) >= count:
        return range(rank(), rank() + 1)
    return range(rank() - int(in_node), rank() - int(in_node) + count)


@functools.cache
def _run_here() -> ConnectedRanks | None:
    from oarlock.cpu_ranks.meeting_point import meeting_point
    from oarlock.cpu_ranks.process_group import current_run
    from oarlock.cpu_ranks.rendezvous import join_ranks

    here = _here()
    if current_run() or len(here) == 1:
        return current_run()
    part = f"ranks {here.start} to {here.stop - 1}" if len(here) < world_size() else ""
    return join_ranks(meeting_point(part), rank() - here.start, len(here), _START_S)


def _share_through_store(text: str) -> list[str | bytes]:
    from paddle.base import core

    store = core.create_or_get_global_tcp_store()
    prefix = f"oarlock/shared/{next(_calls)}"
    store.set(f"{prefix}/{rank()}", text)
    store.add(f"{prefix}/{rank()}/set", 1)
    values = []
    for i in range(world_size()):
        while store.add(f"{prefix}/{i}/set", 0) < 1:  # get() would give up after a quarter of an hour
            time.sleep(_POLL_S)
        values.append(store.get(f"{prefix}/{i}"))
    store.add(f"{prefix}/read", 1)
    while rank() == 0 and store.add(f"{prefix}/read", 0) < world_size():  # the store ends with rank 0
        time.sleep(_POLL_S)
    return values


def _parse(i: int, text: str | bytes) -> Any:
    if isinstance(text, bytes):  # from Paddle's store
        return parse_json(text, f"what rank {i} shares", error=CommunicationError, limit=MAX_SHARED_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommunicationError(f"what rank {i} shares with the others can't be read: {error}") from error


def on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank, however long it takes, and make sure that it worked everywhere. Needs no groups.

    Raises:
        OarlockError: on the first rank that failed, with its message; on the others StoppedWithOthers.
    """
    value, error = _tried(action)
    _stop_together(error, _flags(share_early(error is not None)))
    return value


def once_per_node(action: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Run an action on the first rank of every node; the others wait as long as it takes. Needs no groups.

    Returns:
        What it gave on this node, and on all nodes in order (JSON values). Other nodes' are there to be compared: they
        may have come over a network.

    Raises:
        OarlockError: on the first rank that failed, with its message; on the others StoppedWithOthers.
    """
    host, first = node_key()
    if first is None and len(_here()) == 1:  # a launcher that does not say who shares a machine
        first = rank()
    nodes = ranks_by_node([_key(i, key) for i, key in enumerate(share_early([host, first]))])
    mine = next(ranks for ranks in nodes if rank() in ranks)
    if not set(mine) <= set(_here()):
        raise CommunicationError(f"ranks {mine} say that they share a machine, but ranks {list(_here())} do")
    value, error = _tried(action) if rank() == mine[0] else (None, None)
    results = [_pair(i, result) for i, result in enumerate(share_early([error is not None, value]))]
    _stop_together(error, _flags([failed for failed, _ in results]))
    return results[mine[0]][1], [results[ranks[0]][1] for ranks in nodes]


def _key(i: int, key: Any) -> tuple[str, int | None]:
    host, first = _pair(i, key)
    if not isinstance(host, str) or not (first is None or type(first) is int):
        raise CommunicationError(f"rank {i} does not say where it runs")
    return host, first


def _pair(i: int, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CommunicationError(f"rank {i} does not share the same as the others")
    return value[0], value[1]


def _flags(values: Sequence[Any]) -> list[bool]:
    for i, value in enumerate(values):
        if type(value) is not bool:
            raise CommunicationError(f"rank {i} does not share the same as the others")
    return list(values)


def _tried(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _stop_together(error: Exception | None, failed: Sequence[bool]) -> None:
    if not any(failed):
        return
    first = failed.index(True)
    if error is not None and rank() == first:
        raise error
    raise StoppedWithOthers(f"rank {first} failed")
