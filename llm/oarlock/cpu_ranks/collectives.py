"""Collectives of one group through shared memory: each rank writes to its own slots and reads those of the others."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oarlock.cpu_ranks.rendezvous import ConnectedRanks
from oarlock.cpu_ranks.shared_memory import PAGE, WORD_MASK, fence, round_up
from oarlock.cpu_ranks.tensor_view import REDUCTIONS, TYPE_NAMES, ElementType, name_of, reduce_arrays

SLOT_BYTES = 2 << 20  # half a slot; larger tensors are transferred in parts of this size
SMALL_BYTES = 64 << 10  # up to this size every rank reduces everything, which saves a barrier

OPERATIONS = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_partial", "reduce_scatter", "scatter", "gather",
    "all_to_all", "barrier",
)  # fmt: skip

# Byte offsets in a rank's part of the group's memory. The header of operation n is at n % 2, so a rank that is one
# operation ahead does not overwrite a header that others still compare.
_ARRIVED = 0  # word: number of barriers at which this rank has arrived
_HEADERS = (64, 128)
_LENGTHS = PAGE
_HEADER = struct.Struct("<iiiiQ")
_ROUNDS = struct.Struct("<Q")
_HALF = 1 << 31

Writes = Sequence[tuple[int, np.ndarray]]  # (position in the slot, bytes)
Reads = Sequence[tuple[int, int, np.ndarray]]  # (rank in the group, position in its slot, destination)


@dataclass
class CollectiveCall:
    """A collective that all ranks of a group have to call in the same way.

    Attributes:
        nbytes: 0 if sizes may differ.
        reduction: index into REDUCTIONS.
        root: rank in the group, or -1.
    """

    operation: str
    kind: ElementType
    shape: tuple[int, ...]
    nbytes: int
    reduction: int = 0
    root: int = -1

    def header(self) -> bytes:
        """The bytes that are compared between ranks."""
        return _HEADER.pack(OPERATIONS.index(self.operation), self.kind.code, self.reduction, self.root, self.nbytes)


BARRIER = CollectiveCall("barrier", ElementType("uint8", 1, np.dtype(np.uint8), 1), (), 0)


def describe_header(header: bytes) -> str:
    """A header as text, such as "all_reduce (sum) of float32, 4,096 bytes"."""
    operation, kind, reduction, root, nbytes = _HEADER.unpack(header)
    name = name_of(OPERATIONS, operation)
    if name == "barrier":
        return name
    how = f" ({name_of(REDUCTIONS, reduction)})" if "reduce" in name else ""
    where = f" with rank {root} of the group as root" if root >= 0 else ""
    size = "" if name == "all_to_all" else f", {nbytes:,} bytes"
    return f"{name}{how} of {name_of(TYPE_NAMES, kind)}{size}{where}"


class SharedCollectives:
    """The collectives of one group, made of barriers and of slots that all ranks can read.

    Args:
        ranks: global ranks of the group.
        me: the rank of this process in the group.
        name: unique, and the same on every rank of the group.
        call: the first call, for error messages.
    """

    def __init__(self, run: ConnectedRanks, ranks: list[int], me: int, name: str, call: CollectiveCall) -> None:
        self._run, self.ranks, self.me, self.size = run, ranks, me, len(ranks)
        self._call = call
        self._slots_at = round_up(_LENGTHS + 2 * 8 * self.size)
        nbytes = self._slots_at + 2 * SLOT_BYTES
        mine = run.offer(name, nbytes)
        self._areas = [
            mine if i == me else run.find(rank, name, nbytes, lambda i=i: (self._what(), [ranks[i]]))  # type: ignore[misc]
            for i, rank in enumerate(ranks)
        ]
        self._others = [(me + i) % self.size for i in range(1, self.size)]
        self._arrivals, self._calls, self._turn = 0, 0, 0
        self._views: dict[np.dtype, list[list[np.ndarray]]] = {}

    # barriers

    def _what(self) -> str:
        call = self._call
        what = "" if call.operation == "barrier" else f" of {call.kind.name} {list(call.shape)}"
        return f"{call.operation}{what} in the group of ranks {self.ranks}"

    def _missing(self) -> tuple[str, list[int]]:
        behind = [i for i in self._others if self._is_behind(self._areas[i].words[_ARRIVED])]
        return self._what(), sorted(self.ranks[i] for i in behind)

    def _is_behind(self, arrivals: int) -> bool:
        return (arrivals - self._arrivals) & WORD_MASK >= _HALF

    def _barrier(self) -> None:
        self._arrivals = (self._arrivals + 1) & WORD_MASK
        self._areas[self.me].publish(_ARRIVED, self._arrivals)
        for i in self._others:
            area = self._areas[i]
            if self._is_behind(area.words[_ARRIVED]):
                self._run.wait_until(
                    area, _ARRIVED, lambda value: not self._is_behind(value), self.ranks[i], self._missing
                )
        fence()

    def _open(self, call: CollectiveCall, rounds: int = 1, lengths: Sequence[int] | None = None) -> int:
        """The first barrier of an operation: compares the ranks' calls. Returns the largest number of rounds."""
        self._call, header, at = call, call.header(), _HEADERS[self._calls % 2]
        mine = self._areas[self.me].bytes
        mine[at : at + _HEADER.size] = memoryview(header)
        mine[at + _HEADER.size : at + _HEADER.size + 8] = memoryview(_ROUNDS.pack(rounds))
        if lengths is not None:
            self._lengths(self.me)[:] = lengths
        self._barrier()
        for i in self._others:
            theirs = self._areas[i].bytes[at : at + _HEADER.size + 8].tobytes()
            if theirs[: _HEADER.size] != header:
                raise self._run.fail(
                    f"the ranks of the group {self.ranks} call different collectives at the same time: "
                    f"rank {self.ranks[self.me]} {describe_header(header)}; "
                    f"rank {self.ranks[i]} {describe_header(theirs[: _HEADER.size])}"
                )
            rounds = max(rounds, _ROUNDS.unpack(theirs[_HEADER.size :])[0])
        return rounds

    def _lengths(self, rank: int) -> np.ndarray:
        """Bytes that a rank sends to each other rank in this operation (all_to_all with split sizes)."""
        begin = _LENGTHS + self._calls % 2 * 8 * self.size
        return self._areas[rank].bytes[begin : begin + 8 * self.size].view(np.uint64)

    def _slots(self, dtype: np.dtype) -> list[np.ndarray]:
        """Every rank's slot in this turn. Turns alternate, because a slot is read until its reader's next barrier."""
        if dtype not in self._views:
            begin, end = self._slots_at, self._slots_at + SLOT_BYTES
            self._views[dtype] = [
                [area.bytes[begin + turn : end + turn].view(dtype) for area in self._areas] for turn in (0, SLOT_BYTES)
            ]
        return self._views[dtype][self._turn]

    # operations

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._open(BARRIER)
        self._calls += 1

    def exchange(
        self, call: CollectiveCall, writes: Writes, reads: Reads, positions: int, check_lengths: bool = False
    ) -> None:
        """Each rank writes to its own slot, then reads from the slots of others. Large data takes several rounds.

        Args:
            writes: this rank's data by position. A slot is divided into `positions` equal windows.
            check_lengths: position i is for rank i, which must expect the same number of bytes.
        """
        window = SLOT_BYTES // positions
        longest = max((len(data) for _, data in writes), default=0)
        total = rounds = max(1, -(-longest // window))
        k = 0
        while k < total:
            slots, of_round = self._slots(np.dtype(np.uint8)), slice(k * window, (k + 1) * window)
            for position, data in writes:
                part = data[of_round]
                slots[self.me][position * window : position * window + len(part)] = part
            if k == 0:
                total = self._open(call, rounds, [len(data) for _, data in writes] if check_lengths else None)
                for rank, _, out in reads if check_lengths else ():
                    sent = int(self._lengths(rank)[self.me])
                    if sent != len(out):
                        raise self._run.fail(
                            f"{self._what()}: rank {self.ranks[rank]} sends {sent:,} bytes to rank "
                            f"{self.ranks[self.me]}, which expects {len(out):,}"
                        )
            else:
                self._barrier()
            for rank, position, out in reads:
                part = out[of_round]
                part[...] = slots[rank][position * window : position * window + len(part)]
            self._turn ^= 1
            k += 1
        self._calls += 1

    def reduce(self, call: CollectiveCall, source: np.ndarray, target: np.ndarray | None) -> None:
        """Reduce all ranks' sources, in rank order, into the target, on the ranks that have one.

        Args:
            source: flat, with the same length on all ranks.
            target: may be the source.
        """
        if source.nbytes <= SMALL_BYTES:
            slots = self._slots(source.dtype)
            slots[self.me][: len(source)] = source
            self._open(call)
            if target is not None:
                reduce_arrays(target, [slot[: len(source)] for slot in slots], call.kind, call.reduction)
            self._turn ^= 1
            self._calls += 1
            return
        # Each rank reduces its share for all ranks. The others need only the rest of its data.
        step = SLOT_BYTES // source.itemsize
        for begin in range(0, len(source), step):
            part = source[begin : begin + step]
            shares = _shares(len(part), self.size)
            slots, share = self._slots(source.dtype), shares[self.me]
            slots[self.me][: share.start] = part[: share.start]
            slots[self.me][share.stop : len(part)] = part[share.stop :]
            if begin == 0:
                self._open(call)
            else:
                self._barrier()
            inputs = [part[share] if i == self.me else slot[share] for i, slot in enumerate(slots)]
            reduce_arrays(slots[self.me][share], inputs, call.kind, call.reduction)
            self._barrier()
            if target is not None:
                for slot, of_rank in zip(slots, shares, strict=True):
                    target[begin + of_rank.start : begin + of_rank.stop] = slot[of_rank]
            self._turn ^= 1
        self._calls += 1

    def reduce_scatter(self, call: CollectiveCall, parts: Sequence[np.ndarray], target: np.ndarray) -> None:
        """target = the reduction of all ranks' parts for this rank, in rank order.

        Args:
            parts: one per rank, flat, with the length and type of the target.
        """
        window = SLOT_BYTES // self.size // target.itemsize
        for begin in range(0, max(1, len(target)), window):
            slots = self._slots(target.dtype)
            for i in self._others:
                part = parts[i][begin : begin + window]
                slots[self.me][i * window : i * window + len(part)] = part
            if begin == 0:
                self._open(call)
            else:
                self._barrier()
            out, own = target[begin : begin + window], parts[self.me][begin : begin + window]
            theirs = slice(self.me * window, self.me * window + len(out))
            inputs = [own if i == self.me else slot[theirs] for i, slot in enumerate(slots)]
            # The first two inputs are read before `out` is written. A later one must not share memory with it.
            if self.me > 1 and np.may_share_memory(out, own):
                inputs[self.me] = own.copy()
            reduce_arrays(out, inputs, call.kind, call.reduction)
            self._turn ^= 1
        self._calls += 1


def _shares(count: int, size: int) -> list[slice]:
    """Split count elements into `size` shares of complete cache lines, except for the last."""
    share = round_up(-(-count // size), 64)
    return [slice(min(i * share, count), min((i + 1) * share, count)) for i in range(size)]
