"""Process groups for ranks on the CPUs of one machine, in place of Paddle's Gloo ones.

Paddle's sub-groups on Gloo read each other's stale addresses and lack what tensor, pipeline and sharded training call.
`install()` makes every group that Paddle creates a CpuProcessGroup, which answers to the methods of Paddle's own
ProcessGroup, goes through shared memory, and stops all ranks within seconds when one fails or dies.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from oarlock.compat.patch import AppliedPatches
from oarlock.compat.patches import patches_of
from oarlock.cpu_ranks.meeting_point import check_one_host, meeting_point
from oarlock.cpu_ranks.point_to_point import Mailbox, Receive
from oarlock.cpu_ranks.process_group_api import DONE, Done, GroupCollectives
from oarlock.cpu_ranks.rendezvous import Ranks, join
from oarlock.cpu_ranks.tensor_view import TensorMemory
from oarlock.environment.ranks import rank as global_rank
from oarlock.environment.ranks import world_size

_run: Ranks | None = None
_number = itertools.count()
_groups: weakref.WeakValueDictionary[int, CpuProcessGroup] = weakref.WeakValueDictionary()
_applied = AppliedPatches()
_made: Counter[int] = Counter()  # groups made so far with an id


def install(timeout_s: float = 600.0) -> None:
    """Meet the other ranks, and have Paddle create CpuProcessGroups from now on; before init_parallel_env or
    fleet.init, on every rank. Paddle's store is not made: rank 0 would listen on every address of the machine.

    Args:
        timeout_s: how long a rank waits for the others at the start (a minute at least) and in one operation.

    Raises:
        EnvironmentProblem: as rendezvous.join(); or the ranks are on several machines.
        StoppedWithOthers: another rank tells why.
    """
    global _run
    if _run is not None:
        _run.timeout_s = timeout_s
    elif world_size() > 1:
        check_one_host(global_rank())
        _run = join(meeting_point(), global_rank(), world_size(), timeout_s)
    if not _applied:  # Paddle passes what create_or_get_global_tcp_store returns to new_group as its store
        _applied.apply(patches_of(__name__))


def current_run() -> Ranks | None:
    """The ranks that this one has met; None before install() and in a run of one process."""
    return _run


def new_group(
    backend: str, store: Any, rank: int, world_size: int, group_name: str, pg_options: Any = None,
    group_id: int = 0, *_: Any, **__: Any,
) -> CpuProcessGroup:  # fmt: skip
    return CpuProcessGroup(store, rank, world_size, group_id)


def announce_failure(message: str) -> None:
    """Tell the other ranks that this one fails, so that they stop within seconds and silently; the first one counts.

    An error that nobody catches does so by itself (sys.excepthook).
    """
    if _run is not None:
        _run.announce(message)


def groups() -> list[CpuProcessGroup]:
    """This process's groups, in the order in which they were made."""
    return [group for _, group in sorted(_groups.items())]


class CpuProcessGroup(GroupCollectives):
    """What Paddle calls on a process group: collectives, messages, and their *_on_calc_stream twins.

    Every rank of the group must call the same collective with the same sizes. Ranks in arguments (src, dst) are ranks
    in the group. Results are written into the given tensors and are the same bits on all ranks and in all runs.
    Collectives are over when they return, whatever sync_op says. A send copies and returns. A receive returns a task,
    to be waited for; on_calc_stream it is over on return, or in a batch at the batch's end.

    Raises:
        CommunicationError: in any operation: the ranks disagree, one has ended, or does not come in time.
        StoppedWithOthers: in any operation: another rank has failed or died.
    """

    def __init__(self, run: Ranks, rank: int, size: int, group_id: int) -> None:
        run.watch()
        _made[group_id] += 1  # a group may be destroyed and made again with the same id
        super().__init__(run, rank, size, group_id, f"{group_id} {_made[group_id]}")
        self._mailbox: Mailbox | None = None
        self._batch: list[Receive] | None = None
        _groups[next(_number)] = self

    # Messages.

    def _begin(self, operation: str, nbytes: int) -> None:
        super()._begin(operation, nbytes)
        if self._mailbox is not None:
            self._mailbox.take_what_is_there()

    def _post(self, operation: str, nbytes: int) -> Mailbox:
        self._begin(operation, nbytes)
        if self._mailbox is None:
            self._mailbox = Mailbox(self._run, self.ranks, self._rank, f"messages {self._name} {self.ranks}")
        return self._mailbox

    def send(self, tensor: Any, dst: int, sync_op: bool = True) -> Done:
        """Leave a copy for dst."""
        return self._send(TensorMemory(tensor), dst)

    def send_partial(self, tensor: Any, dst: int, num: int, id: int, sync_op: bool = True) -> Done:
        """Leave part `id` of `num` for dst."""
        return self._send(TensorMemory(tensor).part(num, id), dst)

    def _send(self, data: TensorMemory, dst: int) -> Done:
        self._post("send", data.nbytes).send(data, dst)
        return DONE

    def recv(self, tensor: Any, src: int, sync_op: bool = True) -> Receive:
        """The next message of src, of the tensor's size and type; it is there after the task's wait()."""
        return self.recv_partial(tensor, src, 1, 0)

    def recv_partial(self, tensor: Any, src: int, num: int, id: int, sync_op: bool = True) -> Receive:
        """The same for part `id` of `num` of the tensor."""
        nbytes = TensorMemory(tensor, output=True).nbytes // num
        mailbox = self._post("recv", nbytes)
        expected = Receive(mailbox, tensor, src, num, id)
        mailbox.receive(expected)
        return expected

    def recv_on_calc_stream(self, tensor: Any, src: int) -> Receive:
        """recv() that is over on return, or at the end of a batch."""
        return self.recv_partial_on_calc_stream(tensor, src, 1, 0)

    def recv_partial_on_calc_stream(self, tensor: Any, src: int, num: int, id: int) -> Receive:
        """recv_partial() that is over on return, or at the end of a batch."""
        task = self.recv_partial(tensor, src, num, id)
        if self._batch is None:
            task.wait()
        else:
            self._batch.append(task)
        return task

    def _start_coalescing(self) -> None:
        """A batch begins: its sends and receives may come in any order."""
        self._batch = []

    def _end_coalescing(self, tasks: Sequence[Any] | None = None) -> None:
        batch, self._batch = self._batch or [], None
        for task in batch:
            task.wait()

    # Nothing to connect, and nothing to take down: what a group never used takes no memory.

    def eager_connect(self) -> None:
        """Nothing to do."""

    def eager_connect_ring_exchange(self, nccl_config: Any = None) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to do."""

    def restart(self) -> None:
        """Nothing to do."""

    # Paddle's other names for the same. There are no streams on a CPU.
    send_on_calc_stream, send_partial_on_calc_stream = send, send_partial
