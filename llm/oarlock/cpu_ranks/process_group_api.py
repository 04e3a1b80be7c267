"""The collectives of a process group, with the signatures of Paddle's ProcessGroup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oarlock.cpu_ranks.collectives import BARRIER, CollectiveCall, SharedCollectives
from oarlock.cpu_ranks.failure_detector import CommunicationError
from oarlock.cpu_ranks.rendezvous import ConnectedRanks
from oarlock.cpu_ranks.tensor_view import TensorView

_SUM = 0  # ReduceOp.SUM


class CompletedTask:
    """The task of an operation that is complete when the call returns."""

    def wait(self, *_: Any) -> bool:
        """Return at once."""
        return True

    is_completed = synchronize = is_sync = wait


COMPLETED = CompletedTask()


class GroupCollectives:
    """The collectives of a group of ranks (the base of CpuProcessGroup).

    Args:
        group_id: Paddle's id of the group.
        name: unique, and the same on all ranks of the group.
    """

    def __init__(self, run: ConnectedRanks, rank: int, size: int, group_id: int, name: str) -> None:
        self._run, self._rank, self._size, self.id, self._name = run, rank, size, group_id, name
        self._ranks: list[int] = []
        self._collectives: SharedCollectives | None = None
        self._counts: dict[str, list[int]] = {}

    def rank(self) -> int:
        """The rank of this process in the group."""
        return self._rank

    def size(self) -> int:
        """The number of ranks in the group."""
        return self._size

    def name(self) -> str:
        """The name of the backend."""
        return "CPU"

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the group."""
        if not self._ranks:
            from paddle.distributed.collective import _get_group_map

            # Paddle registers a group after its creation.
            group = _get_group_map().get(self.id)
            ranks = list(group.ranks) if group is not None else []
            if len(ranks) != self._size:
                raise CommunicationError(f"group {self.id} has {self._size} ranks, but Paddle lists {ranks}")
            self._ranks = ranks
        return self._ranks

    def statistics(self) -> dict[str, tuple[int, int]]:
        """Operation -> (number of calls, bytes of this rank's tensors)."""
        return {operation: (calls, nbytes) for operation, (calls, nbytes) in self._counts.items()}

    def reset_statistics(self) -> None:
        """Reset the statistics."""
        self._counts.clear()

    def _begin(self, operation: str, nbytes: int) -> None:
        counts = self._counts.setdefault(operation, [0, 0])
        counts[0] += 1
        counts[1] += nbytes
        if self._run.failed:
            self._run.check()

    def _collectives_for(self, call: CollectiveCall, nbytes: int) -> SharedCollectives:
        self._begin(call.operation, nbytes)
        if self._collectives is None:
            self._collectives = SharedCollectives(
                self._run, self.ranks, self._rank, f"collectives {self._name} {self.ranks}", call
            )
        return self._collectives

    def _expect(self, good: bool, message: str) -> None:
        if not good:
            raise self._run.fail(f"rank {self.ranks[self._rank]} in the group of ranks {self.ranks}: {message}")

    # reductions

    def all_reduce(self, tensor: Any, op: Any = _SUM, sync_op: bool = True) -> CompletedTask:
        """tensor = the reduction of all ranks' tensors."""
        data = TensorView(tensor)
        call = CollectiveCall("all_reduce", data.kind, data.shape, data.nbytes, int(op))
        self._collectives_for(call, data.nbytes).reduce(call, data.array, data.array)
        data.write_back()
        return COMPLETED

    def reduce(self, tensor: Any, dst: int, op: Any = _SUM, sync_op: bool = True) -> CompletedTask:
        """On dst: tensor = the reduction of all ranks' tensors. The others' tensors do not change."""
        data = TensorView(tensor)
        call = CollectiveCall("reduce", data.kind, data.shape, data.nbytes, int(op), dst)
        self._collectives_for(call, data.nbytes).reduce(call, data.array, data.array if self._rank == dst else None)
        data.write_back()
        return COMPLETED

    def reduce_scatter(self, out: Any, tensors: Sequence[Any], op: Any = _SUM, sync_op: bool = True) -> CompletedTask:
        """out [n] = the reduction of all ranks' tensors[this rank] [n]."""
        return self._reduce_scatter(out, [TensorView(tensor).array for tensor in tensors], op)

    def reduce_scatter_tensor(self, out: Any, tensor: Any, op: Any = _SUM, sync_op: bool = True) -> CompletedTask:
        """out [n] = the reduction of all ranks' tensor[rank * n : (rank + 1) * n] [size * n]."""
        return self._reduce_scatter(out, self._split(TensorView(tensor).array), op)

    def _reduce_scatter(self, out: Any, parts: Sequence[np.ndarray], op: Any) -> CompletedTask:
        target = TensorView(out, output=True)
        fits = {(part.dtype, len(part)) for part in parts} == {(target.array.dtype, len(target.array))}
        self._expect(fits and len(parts) == self._size, "reduce_scatter needs one input of the output's size per rank")
        nbytes = target.nbytes * self._size
        call = CollectiveCall("reduce_scatter", target.kind, target.shape, nbytes, int(op))
        self._collectives_for(call, nbytes).reduce_scatter(call, parts, target.array)
        target.write_back()
        return COMPLETED

    # copies

    def broadcast(self, tensor: Any, src: int, sync_op: bool = True) -> CompletedTask:
        """tensor = src's tensor."""
        data = TensorView(tensor, output=self._rank != src)
        call = CollectiveCall("broadcast", data.kind, data.shape, data.nbytes, root=src)
        mine = self._rank == src
        self._collectives_for(call, data.nbytes).exchange(
            call, [(0, data.bytes)] if mine else [], [] if mine else [(src, 0, data.bytes)], 1
        )
        if not mine:
            data.write_back()
        return COMPLETED

    def all_gather(self, first: Any, second: Any, sync_op: bool | None = None) -> CompletedTask:
        """Two functions of Paddle: (out, tensor, sync_op), where `out` is a list or a tensor, and (tensor, out)."""
        out, tensor = (second, first) if sync_op is None else (first, second)
        return self.all_gather_into_tensor(out, tensor)

    def all_gather_into_tensor(self, out: Any, tensor: Any, sync_op: bool = True) -> CompletedTask:
        """out [size * n], or a list of size tensors [n] = all ranks' tensors [n]."""
        return self._all_gather("all_gather", out, TensorView(tensor))

    def all_gather_partial(self, out: Any, tensor: Any, num: int, id: int, sync_op: bool = True) -> CompletedTask:
        """out [size * n / num] = part `id` of `num` of each rank's tensor [n]. out may be the tensor."""
        return self._all_gather("all_gather_partial", out, TensorView(tensor).select_part(num, id))

    def _all_gather(self, operation: str, out: Any, data: TensorView) -> CompletedTask:
        outs, parts = self._parts(out)
        self._expect(all(len(part) == data.nbytes for part in parts), f"{operation}: outputs do not fit the input")
        call = CollectiveCall(operation, data.kind, data.shape, data.nbytes)
        reads = [(i, 0, part) for i, part in enumerate(parts) if i != self._rank]
        mine = data.bytes
        if any(np.may_share_memory(mine, part) for _, _, part in reads):
            mine = mine.copy()
        self._collectives_for(call, data.nbytes).exchange(call, [(0, mine)], reads, 1)
        parts[self._rank][:] = mine
        for each in outs:
            each.write_back()
        return COMPLETED

    def gather(
        self, tensor: Any, outs: Sequence[Any], dst: int, sync_op: bool = True, use_calc_stream: bool = False
    ) -> CompletedTask:
        """On dst: outs[i] = rank i's tensor. All ranks' tensors have the same size."""
        data = TensorView(tensor)
        outputs: list[TensorView] = []
        reads: list[tuple[int, int, np.ndarray]] = []
        if self._rank == dst:
            outputs, parts = self._parts(outs)
            self._expect(all(len(part) == data.nbytes for part in parts), "gather: outputs do not fit the input")
            reads = [(i, 0, part) for i, part in enumerate(parts) if i != dst]
        call = CollectiveCall("gather", data.kind, data.shape, data.nbytes, root=dst)
        self._collectives_for(call, data.nbytes).exchange(
            call, [] if self._rank == dst else [(0, data.bytes)], reads, 1
        )
        if self._rank == dst:
            parts[dst][:] = data.bytes
        for each in outputs:
            each.write_back()
        return COMPLETED

    def scatter(self, first: Any, second: Any, src: int, sync_op: bool | None = None) -> CompletedTask:
        """Two functions of Paddle: (out, tensors, src, sync_op) and (tensor, out, src)."""
        out, tensor = (second, first) if sync_op is None else (first, second)
        return self.scatter_tensor(out, tensor, src)

    def scatter_tensor(self, out: Any, tensor: Any, src: int, sync_op: bool = True) -> CompletedTask:
        """out [n] = part `rank` of src's tensor [size * n] or list of tensors [n]. The others' input is ignored."""
        data, writes = TensorView(out, output=True), []
        if self._rank == src:
            _, parts = self._parts(tensor, output=False)
            self._expect(all(len(part) == data.nbytes for part in parts), "scatter: inputs do not fit the output")
            writes = [(i, part) for i, part in enumerate(parts) if i != src]
        call = CollectiveCall("scatter", data.kind, data.shape, data.nbytes, root=src)
        reads = [] if self._rank == src else [(src, self._rank, data.bytes)]
        self._collectives_for(call, data.nbytes).exchange(call, writes, reads, self._size)
        if self._rank == src:
            data.bytes[:] = parts[src]
        data.write_back()
        return COMPLETED

    def all_to_all(self, outs: Any, tensors: Any, sync_op: bool = True) -> CompletedTask:
        """outs[i] = rank i's tensors[this rank]. Sizes may differ between pairs of ranks."""
        outputs, theirs = self._parts(outs)
        inputs, mine = self._parts(tensors, output=False)
        return self._all_to_all(outputs, theirs, inputs, mine)

    def all_to_all_single(
        self, out: Any, tensor: Any, out_sizes: Sequence[int], in_sizes: Sequence[int], sync_op: bool = True
    ) -> CompletedTask:
        """all_to_all() with one tensor each, split along the first axis by numbers of rows, or equally."""
        outputs, theirs = self._parts(out, out_sizes)
        inputs, mine = self._parts(tensor, in_sizes, output=False)
        return self._all_to_all(outputs, theirs, inputs, mine)

    def alltoall(self, tensor: Any, out: Any) -> CompletedTask:
        """all_to_all() with Paddle's older order of arguments."""
        return self.all_to_all(out, tensor)

    def alltoall_single(
        self, tensor: Any, out: Any, in_sizes: Sequence[int], out_sizes: Sequence[int]
    ) -> CompletedTask:
        """all_to_all_single() with Paddle's older order of arguments."""
        return self.all_to_all_single(out, tensor, out_sizes, in_sizes)

    def _all_to_all(
        self, outputs: list[TensorView], theirs: list[np.ndarray], inputs: list[TensorView], mine: list[np.ndarray]
    ) -> CompletedTask:
        me, nbytes = self._rank, sum(map(len, mine))
        self._expect(len(theirs[me]) == len(mine[me]), "all_to_all: this rank's own output does not fit its input")
        call = CollectiveCall("all_to_all", inputs[0].kind, inputs[0].shape, 0)
        reads = [(i, me, part) for i, part in enumerate(theirs) if i != me]
        own = mine[me].copy()
        self._collectives_for(call, nbytes).exchange(call, list(enumerate(mine)), reads, self._size, check_lengths=True)
        theirs[me][:] = own
        for each in outputs:
            each.write_back()
        return COMPLETED

    def barrier(self, device_id: int = -1) -> CompletedTask:
        """Wait for all ranks of the group."""
        self._collectives_for(BARRIER, 0).barrier()
        return COMPLETED

    def _split(self, array: np.ndarray) -> list[np.ndarray]:
        self._expect(
            len(array) % self._size == 0, f"{len(array):,} elements can't be split into {self._size} equal parts"
        )
        return np.split(array, self._size)

    def _parts(
        self, tensors: Any, rows: Sequence[int] = (), output: bool = True
    ) -> tuple[list[TensorView], list[np.ndarray]]:
        """A list of tensors, or the parts of one tensor along its first axis, as bytes per rank."""
        if isinstance(tensors, (list, tuple)):
            self._expect(len(tensors) == self._size, f"{len(tensors)} tensors were given instead of one per rank")
            whole = [TensorView(tensor, output) for tensor in tensors]
            return whole, [each.bytes for each in whole]
        data = TensorView(tensors, output)
        if not rows:
            return [data], [part.view(np.uint8) for part in self._split(data.array)]
        self._expect(
            len(rows) == self._size and sum(rows) == data.shape[0],
            f"{list(rows)} are not {self._size} sizes with the sum of the tensor's first axis {list(data.shape)}",
        )
        row = data.nbytes // max(1, data.shape[0])
        return [data], np.split(data.bytes, np.cumsum(rows)[:-1] * row)

    # Paddle's other names. There are no streams on a CPU.
    allreduce = all_reduce_on_calc_stream = all_reduce
    reduce_on_calc_stream = reduce
    broadcast_on_calc_stream = broadcast
    _reduce_scatter_base = reduce_scatter_tensor
    reduce_scatter_on_calc_stream, reduce_scatter_tensor_on_calc_stream = reduce_scatter, reduce_scatter_tensor
    all_gather_on_calc_stream = all_gather_into_tensor_on_calc_stream = all_gather_into_tensor
    all_gather_partial_on_calc_stream = all_gather_partial
    scatter_on_calc_stream = scatter_tensor_on_calc_stream = scatter_tensor
    all_to_all_tensor = all_to_all_on_calc_stream = all_to_all_tensor_on_calc_stream = all_to_all
    all_to_all_single_on_calc_stream = all_to_all_single
