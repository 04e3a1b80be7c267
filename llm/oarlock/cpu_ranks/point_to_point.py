"""Sends and receives between two ranks of a group. A send copies and returns, so no order of calls can deadlock."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from oarlock.cpu_ranks.rendezvous import ConnectedRanks
from oarlock.cpu_ranks.shared_memory import PAGE, WORD_MASK, MappedArea, MemoryFile, fence, round_up
from oarlock.cpu_ranks.tensor_view import TYPE_NAMES, TensorView, find_element_type, name_of

# Limit on bytes that one process has sent and others have not received. A send beyond it waits for receivers.
OUTSTANDING_BYTES = 2 << 30
_KEPT_BYTES = 64 << 20  # in free blocks that keep their pages for later messages
_RING = 1024  # limit on messages from one rank to another that are not received
_HEADER = struct.Struct("<QQII")  # offset in the sender's memory, bytes, element type, unused
_LINE = 16  # words per cache line

_heaps: dict[int, MessageHeap] = {}  # by the descriptor of this process's memory


class MessageHeap:
    """Allocates blocks of this process's memory for messages in flight, of 1, 2, 4, ... pages."""

    def __init__(self, memory: MemoryFile) -> None:
        self.memory = memory
        self.outstanding = 0
        self.users: list[PointToPoint] = []
        self._free: dict[int, list[tuple[int, bool]]] = {}  # size -> (offset, still has its pages)
        self._kept = 0

    @staticmethod
    def size_of_block(nbytes: int) -> int:
        """The size of the block for a message of nbytes."""
        return max(PAGE, 1 << max(0, nbytes - 1).bit_length())

    def receivers(self) -> list[int]:
        """Ranks that have not received all messages."""
        return sorted(set().union(*(messages.receivers() for messages in self.users)))

    def allocate(self, nbytes: int) -> int:
        """Allocate a block for nbytes; returns its offset in the memory."""
        size = self.size_of_block(nbytes)
        self.outstanding += size
        blocks = self._free.get(size)
        if not blocks:
            return self.memory.reserve(size)
        offset, has_pages = blocks.pop()
        self._kept -= size * has_pages
        return offset

    def free(self, offset: int, nbytes: int) -> None:
        """Free the block of a message that has been received."""
        size = self.size_of_block(nbytes)
        self.outstanding -= size
        keep = self._kept + size <= _KEPT_BYTES
        if keep:
            self._kept += size
        else:
            self.memory.release(offset, size)
        self._free.setdefault(size, []).append((offset, keep))


class PointToPoint:
    """The sends and receives of this rank in one group. Messages between two ranks keep their order.

    Args:
        ranks: global ranks of the group.
        me: the rank of this process in the group.
        name: unique, and the same on every rank of the group.
    """

    def __init__(self, run: ConnectedRanks, ranks: list[int], me: int, name: str) -> None:
        self._run, self.ranks, self.me, self._name = run, ranks, me, name
        size = len(ranks)
        # Words: messages sent to each rank, messages received from each rank. Then a ring of headers per receiver.
        self._rings_at = round_up(2 * size * 4 * _LINE)
        self._nbytes = self._rings_at + size * _RING * _HEADER.size
        self._areas: dict[int, MappedArea] = {me: run.offer(name, self._nbytes)}
        memory = run.members[run.rank].memory
        self._heap = _heaps.setdefault(memory.descriptor, MessageHeap(memory))
        self._heap.users.append(self)
        self._unreceived: list[deque[tuple[int, int]]] = [deque() for _ in ranks]  # (offset, bytes) by receiver
        self._expected: list[deque[ReceiveTask]] = [deque() for _ in ranks]  # by sender
        self._received = [0] * size

    def send(self, data: TensorView, to: int) -> None:
        """Send a message to a rank of the group.

        Raises:
            CommunicationError: the receivers don't receive earlier messages in time.
        """
        if to == self.me:
            raise self._run.fail(f"rank {self.ranks[to]} sends to itself in the group of ranks {self.ranks}")
        heap = self._heap
        if not self._has_room(data.nbytes, to):
            what = f"send of {data.kind.name} {list(data.shape)} in the group of ranks {self.ranks}"
            self._run.poll_until(lambda: self._has_room(data.nbytes, to), lambda: (what, heap.receivers()))
        offset = heap.allocate(data.nbytes)
        heap.memory.write(offset, data.bytes)
        self._unreceived[to].append((offset, data.nbytes))
        mine = self._areas[self.me]
        count = mine.words[to * _LINE]
        at = self._header_at(to, count)
        mine.bytes[at : at + _HEADER.size] = memoryview(_HEADER.pack(offset, data.nbytes, data.kind.code, 0))
        mine.publish(to * _LINE, count + 1)

    def collect(self) -> None:
        """Free the blocks of messages that have been received."""
        for to, sent in enumerate(self._unreceived):
            if sent and self._open(to):
                received = self._areas[to].words[self._received_word(self.me)]
                while len(sent) > (self._areas[self.me].words[to * _LINE] - received) & WORD_MASK:
                    self._heap.free(*sent.popleft())

    def _has_room(self, nbytes: int, to: int) -> bool:
        for messages in self._heap.users:
            messages.collect()
        outstanding = self._heap.outstanding
        is_full = outstanding + self._heap.size_of_block(nbytes) > OUTSTANDING_BYTES
        # A single message may have any size.
        return len(self._unreceived[to]) < _RING and not (outstanding > 0 and is_full)

    def receivers(self) -> set[int]:
        """Global ranks that have not received all messages."""
        return {self.ranks[to] for to, sent in enumerate(self._unreceived) if sent}

    def receive(self, expected: ReceiveTask) -> None:
        """Queue a receive of the next message of a rank of the group."""
        if expected.sender == self.me:
            rank = self.ranks[self.me]
            raise self._run.fail(f"rank {rank} receives from itself in the group of ranks {self.ranks}")
        self._expected[expected.sender].append(expected)

    def complete(self, wanted: ReceiveTask) -> None:
        """Receive messages of its sender, in order, up to this one."""
        queue = self._expected[wanted.sender]
        while not wanted.done:
            self._receive_next(queue[0], wait=True)
            queue.popleft().done = True

    def receive_available(self) -> None:
        """Receive the messages that have arrived, without waiting."""
        for queue in self._expected:
            while queue and self._receive_next(queue[0], wait=False):
                queue.popleft().done = True

    def _receive_next(self, expected: ReceiveTask, wait: bool) -> bool:
        sender, word = expected.sender, self.me * _LINE
        rank, count = self.ranks[sender], self._received[sender]
        if not self._open(sender, expected if wait else None):
            return False
        area = self._areas[sender]
        if not wait and area.words[word] == count:
            return False
        self._run.wait_until(area, word, lambda value: value != count, rank, lambda: self._describe(expected))
        at = self._header_at(self.me, count)
        offset, nbytes, kind, _ = _HEADER.unpack(area.bytes[at : at + _HEADER.size].tobytes())
        data = expected.destination()
        if (nbytes, kind) != (data.nbytes, data.kind.code):
            raise self._run.fail(
                f"recv in the group of ranks {self.ranks}: rank {self.ranks[self.me]} expects {data.nbytes:,} bytes "
                f"of {data.kind.name} ({expected}), rank {rank} has sent {nbytes:,} bytes of "
                f"{name_of(TYPE_NAMES, kind)}"
            )
        self._run.members[rank].memory.read(offset, data.bytes)
        data.write_back()
        self._received[sender] = (count + 1) & WORD_MASK
        fence()
        self._areas[self.me].publish(self._received_word(sender), count + 1)
        return True

    def _open(self, rank: int, waiting: ReceiveTask | None = None) -> bool:
        """Map the other rank's part. False if it has none yet and no receive waits for it."""
        if rank not in self._areas:
            peer = self.ranks[rank]
            if waiting is None and not self._run.is_offered(peer, self._name):
                return False
            self._areas[rank] = self._run.find(peer, self._name, self._nbytes, lambda: self._describe(waiting))
        return True

    def _describe(self, waiting: ReceiveTask | None) -> tuple[str, list[int]]:
        if waiting is None:
            return f"a message in the group of ranks {self.ranks}", []
        sender = self.ranks[waiting.sender]
        return f"recv of {waiting} from rank {sender} in the group of ranks {self.ranks}", [sender]

    def _received_word(self, sender: int) -> int:
        return (len(self.ranks) + sender) * _LINE

    def _header_at(self, to: int, count: int) -> int:
        return self._rings_at + (to * _RING + count % _RING) * _HEADER.size


class ReceiveTask:
    """A message to be received; a task in the sense of Paddle.

    Args:
        sender: rank in the group.
        num_parts: the message fills part `index` of so many equal parts of the tensor.
    """

    def __init__(self, messages: PointToPoint, tensor: Any, sender: int, num_parts: int = 1, index: int = 0) -> None:
        self._messages, self._tensor, self.sender = messages, tensor, sender
        self._num_parts, self._index, self.done = num_parts, index, False

    def destination(self) -> TensorView:
        """The destination. It is looked up on arrival, because the tensor's memory may change until then."""
        return TensorView(self._tensor, output=True).select_part(self._num_parts, self._index)

    def wait(self, *_: Any) -> bool:
        """Wait until the message is in the tensor."""
        self._messages.complete(self)
        return True

    def is_completed(self) -> bool:
        """Receive the message if it has arrived, and return whether it is in the tensor."""
        self._messages.receive_available()
        return self.done

    synchronize = wait

    def is_sync(self) -> bool:
        """Whether the operation is synchronous."""
        return False

    def __str__(self) -> str:
        part = f" (part {self._index} of {self._num_parts})" if self._num_parts > 1 else ""
        return f"{find_element_type(self._tensor.dtype).name} {list(self._tensor.shape)}{part}"
