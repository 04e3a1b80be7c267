"""Process groups for CPU ranks of one machine, instead of Paddle's Gloo groups.

Paddle's Gloo sub-groups read stale addresses of each other, and lack operations of tensor, pipeline and sharded
training. After `install()`, every group that Paddle creates is a CpuProcessGroup. It has the methods of Paddle's
ProcessGroup, uses shared memory, and stops all ranks within seconds when one fails or dies.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from oarlock.compat.patch import AppliedPatches
from oarlock.compat.patches import list_patches
from oarlock.cpu_ranks.meeting_point import check_one_host, meeting_point
from oarlock.cpu_ranks.point_to_point import PointToPoint, ReceiveTask
from oarlock.cpu_ranks.process_group_api import COMPLETED, CompletedTask, GroupCollectives
from oarlock.cpu_ranks.rendezvous import ConnectedRanks, join_ranks
from oarlock.cpu_ranks.tensor_view import TensorView
from oarlock.environment.ranks import rank as global_rank
from oarlock.environment.ranks import world_size

_run: ConnectedRanks | None = None
_number = itertools.count()
_groups: weakref.WeakValueDictionary[int, CpuProcessGroup] = weakref.WeakValueDictionary()
_applied = AppliedPatches()
_num_created: Counter[int] = Counter()  # groups created so far, by id


def install(timeout_s: float = 600.0) -> None:
    """Connect to the other ranks, and make Paddle create CpuProcessGroups from now on.

    Call this on every rank before init_parallel_env() or fleet.init(). Paddle's store is not created, because rank 0
    would listen on every address of the machine.

    Args:
        timeout_s: how long a rank waits for the others at the start (at least a minute) and in one operation.

    Raises:
        EnvironmentProblem: see rendezvous.join_ranks(), or the ranks are on several machines.
        StoppedWithOthers: another rank reports the reason.
    """
    global _run
    if _run is not None:
        _run.timeout_s = timeout_s
    elif world_size() > 1:
        check_one_host(global_rank())
        _run = join_ranks(meeting_point(), global_rank(), world_size(), timeout_s)
    if not _applied:  # Paddle passes what create_or_get_global_tcp_store returns to new_group as its store
        _applied.apply(list_patches(__name__))


def current_run() -> ConnectedRanks | None:
    """The ranks of this run; None before install() and in a run of one process."""
    return _run


def new_group(
    backend: str, store: Any, rank: int, world_size: int, group_name: str, pg_options: Any = None,
    group_id: int = 0, *_: Any, **__: Any,
) -> CpuProcessGroup:  # fmt: skip
    return CpuProcessGroup(store, rank, world_size, group_id)


def announce_failure(message: str) -> None:
    """Report to the other ranks that this one fails. They stop within seconds; only the first failure is printed.

    Uncaught errors are reported automatically (sys.excepthook).
    """
    if _run is not None:
        _run.announce(message)


def groups() -> list[CpuProcessGroup]:
    """The groups of this process, in order of creation."""
    return [group for _, group in sorted(_groups.items())]


class CpuProcessGroup(GroupCollectives):
    """The interface of Paddle's ProcessGroup: collectives, sends and receives, and their *_on_calc_stream variants.

    All ranks of the group must call the same collectives with the same sizes. Ranks in arguments (src, dst) are ranks
    in the group. Results are written to the given tensors, and have the same bits on all ranks and in all runs.
    Collectives are complete on return, whatever sync_op is. A send copies and returns. A receive returns a task; on
    calc_stream, it is complete on return, or at the end of a batch.

    Raises:
        CommunicationError: in any operation, if the ranks disagree, or one has ended or is late.
        StoppedWithOthers: in any operation, if another rank has failed or died.
    """

    def __init__(self, run: ConnectedRanks, rank: int, size: int, group_id: int) -> None:
        run.start_watchdog()
        _num_created[group_id] += 1  # a group may be destroyed and created again with the same id
        super().__init__(run, rank, size, group_id, f"{group_id} {_num_created[group_id]}")
        self._messages: PointToPoint | None = None
        self._batch: list[ReceiveTask] | None = None
        _groups[next(_number)] = self

    # sends and receives

    def _begin(self, operation: str, nbytes: int) -> None:
        super()._begin(operation, nbytes)
        if self._messages is not None:
            self._messages.receive_available()

    def _post(self, operation: str, nbytes: int) -> PointToPoint:
        self._begin(operation, nbytes)
        if self._messages is None:
            self._messages = PointToPoint(self._run, self.ranks, self._rank, f"messages {self._name} {self.ranks}")
        return self._messages

    def send(self, tensor: Any, dst: int, sync_op: bool = True) -> CompletedTask:
        """Send a copy to dst."""
        return self._send(TensorView(tensor), dst)

    def send_partial(self, tensor: Any, dst: int, num: int, id: int, sync_op: bool = True) -> CompletedTask:
        """Send part `id` of `num` of the tensor to dst."""
        return self._send(TensorView(tensor).select_part(num, id), dst)

    def _send(self, data: TensorView, dst: int) -> CompletedTask:
        self._post("send", data.nbytes).send(data, dst)
        return COMPLETED

    def recv(self, tensor: Any, src: int, sync_op: bool = True) -> ReceiveTask:
        """Receive the next message of src, which must have the tensor's size and type. Wait for the task."""
        return self.recv_partial(tensor, src, 1, 0)

    def recv_partial(self, tensor: Any, src: int, num: int, id: int, sync_op: bool = True) -> ReceiveTask:
        """Receive part `id` of `num` of the tensor from src. Wait for the task."""
        nbytes = TensorView(tensor, output=True).nbytes // num
        messages = self._post("recv", nbytes)
        expected = ReceiveTask(messages, tensor, src, num, id)
        messages.receive(expected)
        return expected

    def recv_on_calc_stream(self, tensor: Any, src: int) -> ReceiveTask:
        """recv() that is complete on return, or at the end of a batch."""
        return self.recv_partial_on_calc_stream(tensor, src, 1, 0)

    def recv_partial_on_calc_stream(self, tensor: Any, src: int, num: int, id: int) -> ReceiveTask:
        """recv_partial() that is complete on return, or at the end of a batch."""
        task = self.recv_partial(tensor, src, num, id)
        if self._batch is None:
            task.wait()
        else:
            self._batch.append(task)
        return task

    def _start_coalescing(self) -> None:
        """Begin a batch, in which sends and receives may be in any order."""
        self._batch = []

    def _end_coalescing(self, tasks: Sequence[Any] | None = None) -> None:
        batch, self._batch = self._batch or [], None
        for task in batch:
            task.wait()

    # Nothing to connect and nothing to shut down: an unused group takes no memory.

    def eager_connect(self) -> None:
        """Do nothing."""

    def eager_connect_ring_exchange(self, nccl_config: Any = None) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing."""

    def restart(self) -> None:
        """Do nothing."""

    # Paddle's other names. There are no streams on a CPU.
    send_on_calc_stream, send_partial_on_calc_stream = send, send_partial
