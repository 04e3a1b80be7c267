"""The collectives of a process group, as Paddle's ProcessGroup has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oarlock.cpu_ranks.collectives import BARRIER, Call, Meeting
from oarlock.cpu_ranks.failure_detector import CommunicationError
from oarlock.cpu_ranks.rendezvous import Ranks
from oarlock.cpu_ranks.tensor_view import TensorMemory

_SUM = 0  # ReduceOp.SUM


class Done:
    """The task of an operation that is over when the call returns."""

    def wait(self, *_: Any) -> bool:
        """Nothing is left to wait for."""
        return True

    is_completed = synchronize = is_sync = wait


DONE = Done()


class GroupCollectives:
    """A group of ranks and its collectives; see CpuProcessGroup.

    Args:
        group_id: Paddle's number of the group.
        name: the same on all its ranks, and no other group's.
    """

    def __init__(self, run: Ranks, rank: int, size: int, group_id: int, name: str) -> None:
        self._run, self._rank, self._size, self.id, self._name = run, rank, size, group_id, name
        self._ranks: list[int] = []
        self._meeting: Meeting | None = None
        self._counts: dict[str, list[int]] = {}

    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    def size(self) -> int:
        """Ranks in the group."""
        return self._size

    def name(self) -> str:
        """The backend's name."""
        return "CPU"

    @property
    def ranks(self) -> list[int]:
        """Global ranks of the group."""
        if not self._ranks:
            from paddle.distributed.collective import _get_group_map

            # Paddle lists a group after it has made it.
            group = _get_group_map().get(self.id)
            ranks = list(group.ranks) if group is not None else []
            if len(ranks) != self._size:
                raise CommunicationError(f"group {self.id} has {self._size} ranks, but Paddle lists {ranks}")
            self._ranks = ranks
        return self._ranks

    def statistics(self) -> dict[str, tuple[int, int]]:
        """Operation -> (calls, bytes of this rank's tensors in them)."""
        return {operation: (calls, nbytes) for operation, (calls, nbytes) in self._counts.items()}

    def reset_statistics(self) -> None:
        """Count from zero."""
        self._counts.clear()

    def _begin(self, operation: str, nbytes: int) -> None:
        counts = self._counts.setdefault(operation, [0, 0])
        counts[0] += 1
        counts[1] += nbytes
        if self._run.failed:
            self._run.check()

    def _meet(self, call: Call, nbytes: int) -> Meeting:
        self._begin(call.operation, nbytes)
        if self._meeting is None:
            self._meeting = Meeting(self._run, self.ranks, self._rank, f"collectives {self._name} {self.ranks}", call)
        return self._meeting

    def _expect(self, good: bool, message: str) -> None:
        if not good:
            raise self._run.fail(f"rank {self.ranks[self._rank]} in the group of ranks {self.ranks}: {message}")

    # Reductions.

    def all_reduce(self, tensor: Any, op: Any = _SUM, sync_op: bool = True) -> Done:
        """Tensor = the combination of all ranks' tensors."""
        data = TensorMemory(tensor)
        call = Call("all_reduce", data.kind, data.shape, data.nbytes, int(op))
        self._meet(call, data.nbytes).reduce(call, data.array, data.array)
        data.put_back()
        return DONE

    def reduce(self, tensor: Any, dst: int, op: Any = _SUM, sync_op: bool = True) -> Done:
        """The same on dst alone; the others' tensors stay."""
        data = TensorMemory(tensor)
        call = Call("reduce", data.kind, data.shape, data.nbytes, int(op), dst)
        self._meet(call, data.nbytes).reduce(call, data.array, data.array if self._rank == dst else None)
        data.put_back()
        return DONE

    def reduce_scatter(self, out: Any, tensors: Sequence[Any], op: Any = _SUM, sync_op: bool = True) -> Done:
        """out [n] = the combination of all ranks' tensors[this rank] [n]."""
        return self._reduce_scatter(out, [TensorMemory(tensor).array for tensor in tensors], op)

    def reduce_scatter_tensor(self, out: Any, tensor: Any, op: Any = _SUM, sync_op: bool = True) -> Done:
        """out [n] = the combination of all ranks' tensor[rank * n : (rank + 1) * n] [size * n]."""
        return self._reduce_scatter(out, self._split(TensorMemory(tensor).array), op)

    def _reduce_scatter(self, out: Any, pieces: Sequence[np.ndarray], op: Any) -> Done:
        target = TensorMemory(out, output=True)
        fits = {(piece.dtype, len(piece)) for piece in pieces} == {(target.array.dtype, len(target.array))}
        self._expect(fits and len(pieces) == self._size, "reduce_scatter needs one input of the output's size per rank")
        nbytes = target.nbytes * self._size
        call = Call("reduce_scatter", target.kind, target.shape, nbytes, int(op))
        self._meet(call, nbytes).reduce_scatter(call, pieces, target.array)
        target.put_back()
        return DONE

    # Copies.

    def broadcast(self, tensor: Any, src: int, sync_op: bool = True) -> Done:
        """Tensor = src's tensor."""
        data = TensorMemory(tensor, output=self._rank != src)
        call = Call("broadcast", data.kind, data.shape, data.nbytes, root=src)
        mine = self._rank == src
        self._meet(call, data.nbytes).exchange(
            call, [(0, data.bytes)] if mine else [], [] if mine else [(src, 0, data.bytes)], 1
        )
        if not mine:
            data.put_back()
        return DONE

    def all_gather(self, first: Any, second: Any, sync_op: bool | None = None) -> Done:
        """Paddle has two of this name: (out, tensor, sync_op), `out` a list or a tensor, and (tensor, out)."""
        out, tensor = (second, first) if sync_op is None else (first, second)
        return self.all_gather_into_tensor(out, tensor)

    def all_gather_into_tensor(self, out: Any, tensor: Any, sync_op: bool = True) -> Done:
        """out [size * n], or a list of size tensors [n] = all ranks' tensors [n]."""
        return self._all_gather("all_gather", out, TensorMemory(tensor))

    def all_gather_partial(self, out: Any, tensor: Any, num: int, id: int, sync_op: bool = True) -> Done:
        """out [size * n / num] = part `id` of `num` of each rank's tensor [n]; out may be the tensor."""
        return self._all_gather("all_gather_partial", out, TensorMemory(tensor).part(num, id))

    def _all_gather(self, operation: str, out: Any, data: TensorMemory) -> Done:
        outs, pieces = self._pieces(out)
        self._expect(all(len(piece) == data.nbytes for piece in pieces), f"{operation}: outputs do not fit the input")
        call = Call(operation, data.kind, data.shape, data.nbytes)
        reads = [(i, 0, piece) for i, piece in enumerate(pieces) if i != self._rank]
        mine = data.bytes
        if any(np.may_share_memory(mine, piece) for _, _, piece in reads):
            mine = mine.copy()
        self._meet(call, data.nbytes).exchange(call, [(0, mine)], reads, 1)
        pieces[self._rank][:] = mine
        for each in outs:
            each.put_back()
        return DONE

    def gather(
        self, tensor: Any, outs: Sequence[Any], dst: int, sync_op: bool = True, use_calc_stream: bool = False
    ) -> Done:
        """On dst: outs[i] = rank i's tensor, of one size on all ranks."""
        data = TensorMemory(tensor)
        outputs: list[TensorMemory] = []
        reads: list[tuple[int, int, np.ndarray]] = []
        if self._rank == dst:
            outputs, pieces = self._pieces(outs)
            self._expect(all(len(piece) == data.nbytes for piece in pieces), "gather: outputs do not fit the input")
            reads = [(i, 0, piece) for i, piece in enumerate(pieces) if i != dst]
        call = Call("gather", data.kind, data.shape, data.nbytes, root=dst)
        self._meet(call, data.nbytes).exchange(call, [] if self._rank == dst else [(0, data.bytes)], reads, 1)
        if self._rank == dst:
            pieces[dst][:] = data.bytes
        for each in outputs:
            each.put_back()
        return DONE

    def scatter(self, first: Any, second: Any, src: int, sync_op: bool | None = None) -> Done:
        """Paddle has two of this name: (out, tensors, src, sync_op) and (tensor, out, src)."""
        out, tensor = (second, first) if sync_op is None else (first, second)
        return self.scatter_tensor(out, tensor, src)

    def scatter_tensor(self, out: Any, tensor: Any, src: int, sync_op: bool = True) -> Done:
        """out [n] = part `rank` of src's tensor [size * n], or of its list of tensors [n]; others' input is ignored."""
        data, writes = TensorMemory(out, output=True), []
        if self._rank == src:
            _, pieces = self._pieces(tensor, output=False)
            self._expect(all(len(piece) == data.nbytes for piece in pieces), "scatter: inputs do not fit the output")
            writes = [(i, piece) for i, piece in enumerate(pieces) if i != src]
        call = Call("scatter", data.kind, data.shape, data.nbytes, root=src)
        reads = [] if self._rank == src else [(src, self._rank, data.bytes)]
        self._meet(call, data.nbytes).exchange(call, writes, reads, self._size)
        if self._rank == src:
            data.bytes[:] = pieces[src]
        data.put_back()
        return DONE

    def all_to_all(self, outs: Any, tensors: Any, sync_op: bool = True) -> Done:
        """outs[i] = rank i's tensors[this rank]; each pair of ranks has a size of its own."""
        outputs, theirs = self._pieces(outs)
        inputs, mine = self._pieces(tensors, output=False)
        return self._all_to_all(outputs, theirs, inputs, mine)

    def all_to_all_single(
        self, out: Any, tensor: Any, out_sizes: Sequence[int], in_sizes: Sequence[int], sync_op: bool = True
    ) -> Done:
        """The same with one tensor each, cut along its first axis: sizes in rows, or none for equal parts."""
        outputs, theirs = self._pieces(out, out_sizes)
        inputs, mine = self._pieces(tensor, in_sizes, output=False)
        return self._all_to_all(outputs, theirs, inputs, mine)

    def alltoall(self, tensor: Any, out: Any) -> Done:
        """all_to_all with its older order of arguments."""
        return self.all_to_all(out, tensor)

    def alltoall_single(self, tensor: Any, out: Any, in_sizes: Sequence[int], out_sizes: Sequence[int]) -> Done:
        """all_to_all_single with its older order of arguments."""
        return self.all_to_all_single(out, tensor, out_sizes, in_sizes)

    def _all_to_all(
        self, outputs: list[TensorMemory], theirs: list[np.ndarray], inputs: list[TensorMemory], mine: list[np.ndarray]
    ) -> Done:
        me, nbytes = self._rank, sum(map(len, mine))
        self._expect(len(theirs[me]) == len(mine[me]), "all_to_all: this rank's own output does not fit its input")
        call = Call("all_to_all", inputs[0].kind, inputs[0].shape, 0)
        reads = [(i, me, piece) for i, piece in enumerate(theirs) if i != me]
        own = mine[me].copy()
        self._meet(call, nbytes).exchange(call, list(enumerate(mine)), reads, self._size, check_lengths=True)
        theirs[me][:] = own
        for each in outputs:
            each.put_back()
        return DONE

    def barrier(self, device_id: int = -1) -> Done:
        """Wait for all ranks of the group."""
        self._meet(BARRIER, 0).barrier()
        return DONE

    def _split(self, array: np.ndarray) -> list[np.ndarray]:
        self._expect(
            len(array) % self._size == 0, f"{len(array):,} elements can't be cut into {self._size} equal parts"
        )
        return np.split(array, self._size)

    def _pieces(
        self, tensors: Any, rows: Sequence[int] = (), output: bool = True
    ) -> tuple[list[TensorMemory], list[np.ndarray]]:
        """A list of tensors, or the parts of one along its first axis, as bytes for each rank."""
        if isinstance(tensors, (list, tuple)):
            self._expect(len(tensors) == self._size, f"{len(tensors)} tensors were given, one per rank is needed")
            whole = [TensorMemory(tensor, output) for tensor in tensors]
            return whole, [each.bytes for each in whole]
        data = TensorMemory(tensors, output)
        if not rows:
            return [data], [piece.view(np.uint8) for piece in self._split(data.array)]
        self._expect(
            len(rows) == self._size and sum(rows) == data.shape[0],
            f"{list(rows)} are not {self._size} sizes that add up to the tensor's first axis {list(data.shape)}",
        )
        row = data.nbytes // max(1, data.shape[0])
        return [data], np.split(data.bytes, np.cumsum(rows)[:-1] * row)

    # Paddle's other names for the same. There are no streams on a CPU.
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
