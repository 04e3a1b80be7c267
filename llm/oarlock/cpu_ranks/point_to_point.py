"""Messages between two ranks of a group: a send copies and returns, so that no order of sends and receives can hang."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from oarlock.cpu_ranks.rendezvous import Ranks
from oarlock.cpu_ranks.shared_memory import PAGE, WORD_MASK, Area, Memory, fence, round_up
from oarlock.cpu_ranks.tensor_view import KIND_NAMES, TensorMemory, kind_of, name_of

# Bytes of messages sent by one process and not received yet: a send beyond them waits for receivers.
OUTSTANDING_BYTES = 2 << 30
_KEPT_BYTES = 64 << 20  # free blocks that keep their pages for the next message
_RING = 1024  # messages from one rank to another not received yet
_NOTE = struct.Struct("<QQII")  # where in the sender's memory, bytes, element type, unused
_LINE = 16  # words a cache line

_heaps: dict[int, Heap] = {}  # by the descriptor of this process's memory


class Heap:
    """Blocks of this process's memory for messages under way, of a page, two, four, ..."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.outstanding = 0
        self.mailboxes: list[Mailbox] = []
        self._free: dict[int, list[tuple[int, bool]]] = {}  # size -> (offset, still has its pages)
        self._kept = 0

    @staticmethod
    def size_of_block(nbytes: int) -> int:
        """What a message of nbytes takes."""
        return max(PAGE, 1 << max(0, nbytes - 1).bit_length())

    def is_full_for(self, nbytes: int) -> bool:
        """Whether a message must wait for receivers. A single one of any size goes."""
        return self.outstanding > 0 and self.outstanding + self.size_of_block(nbytes) > OUTSTANDING_BYTES

    def receivers(self) -> list[int]:
        """Ranks who have not received everything."""
        return sorted(set().union(*(mailbox.receivers() for mailbox in self.mailboxes)))

    def take(self, nbytes: int) -> int:
        """A block for nbytes; returns its offset in the memory."""
        size = self.size_of_block(nbytes)
        self.outstanding += size
        blocks = self._free.get(size)
        if not blocks:
            return self.memory.reserve(size)
        offset, has_pages = blocks.pop()
        self._kept -= size * has_pages
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """The message has been received."""
        size = self.size_of_block(nbytes)
        self.outstanding -= size
        keep = self._kept + size <= _KEPT_BYTES
        if keep:
            self._kept += size
        else:
            self.memory.release(offset, size)
        self._free.setdefault(size, []).append((offset, keep))


class Mailbox:
    """The messages of one group from and to this rank. Each pair of ranks has its own order in each direction.

    Args:
        ranks: global ranks of the group.
        me: this process's rank in the group.
        name: the same on every rank of the group, and no other group's.
    """

    def __init__(self, run: Ranks, ranks: list[int], me: int, name: str) -> None:
        self._run, self.ranks, self.me, self._name = run, ranks, me, name
        size = len(ranks)
        # Words: sent to each rank, taken from each rank; then a ring of notes for each receiver.
        self._rings_at = round_up(2 * size * 4 * _LINE)
        self._nbytes = self._rings_at + size * _RING * _NOTE.size
        self._areas: dict[int, Area] = {me: run.offer(name, self._nbytes)}
        memory = run.members[run.rank].memory
        self._heap = _heaps.setdefault(memory.descriptor, Heap(memory))
        self._heap.mailboxes.append(self)
        self._unreceived: list[deque[tuple[int, int]]] = [deque() for _ in ranks]  # (offset, bytes) by receiver
        self._expected: list[deque[Receive]] = [deque() for _ in ranks]  # by sender
        self._received = [0] * size

    def send(self, data: TensorMemory, to: int) -> None:
        """Leave a message for a rank of the group.

        Raises:
            CommunicationError: the receivers left too much lying for too long.
        """
        if to == self.me:
            raise self._run.fail(f"rank {self.ranks[to]} sends to itself in the group of ranks {self.ranks}")
        heap = self._heap
        if not self._has_room(data.nbytes, to):
            what = f"send of {data.kind.name} {list(data.shape)} in the group of ranks {self.ranks}"
            self._run.poll_until(lambda: self._has_room(data.nbytes, to), lambda: (what, heap.receivers()))
        offset = heap.take(data.nbytes)
        heap.memory.write(offset, data.bytes)
        self._unreceived[to].append((offset, data.nbytes))
        mine = self._areas[self.me]
        count = mine.words[to * _LINE]
        at = self._note_at(to, count)
        mine.bytes[at : at + _NOTE.size] = memoryview(_NOTE.pack(offset, data.nbytes, data.kind.code, 0))
        mine.publish(to * _LINE, count + 1)

    def collect(self) -> None:
        """Take back the blocks of messages that have been received."""
        for to, sent in enumerate(self._unreceived):
            if sent and self._open(to):
                taken = self._areas[to].words[self._taken_word(self.me)]
                while len(sent) > (self._areas[self.me].words[to * _LINE] - taken) & WORD_MASK:
                    self._heap.give_back(*sent.popleft())

    def _has_room(self, nbytes: int, to: int) -> bool:
        for mailbox in self._heap.mailboxes:
            mailbox.collect()
        return len(self._unreceived[to]) < _RING and not self._heap.is_full_for(nbytes)

    def receivers(self) -> set[int]:
        """Global ranks who have not received everything."""
        return {self.ranks[to] for to, sent in enumerate(self._unreceived) if sent}

    def receive(self, expected: Receive) -> None:
        """Expect the next message of a rank of the group."""
        if expected.sender == self.me:
            rank = self.ranks[self.me]
            raise self._run.fail(f"rank {rank} receives from itself in the group of ranks {self.ranks}")
        self._expected[expected.sender].append(expected)

    def complete(self, wanted: Receive) -> None:
        """Receive everything up to this one from its sender, in order."""
        queue = self._expected[wanted.sender]
        while not wanted.done:
            self._take(queue[0], wait=True)
            queue.popleft().done = True

    def take_what_is_there(self) -> None:
        """Receive without waiting."""
        for queue in self._expected:
            while queue and self._take(queue[0], wait=False):
                queue.popleft().done = True

    def _take(self, expected: Receive, wait: bool) -> bool:
        sender, word = expected.sender, self.me * _LINE
        rank, count = self.ranks[sender], self._received[sender]
        if not self._open(sender, expected if wait else None):
            return False
        area = self._areas[sender]
        if not wait and area.words[word] == count:
            return False
        self._run.wait_until(area, word, lambda value: value != count, rank, lambda: self._describe(expected))
        at = self._note_at(self.me, count)
        offset, nbytes, kind, _ = _NOTE.unpack(area.bytes[at : at + _NOTE.size].tobytes())
        data = expected.memory()
        if (nbytes, kind) != (data.nbytes, data.kind.code):
            raise self._run.fail(
                f"recv in the group of ranks {self.ranks}: rank {self.ranks[self.me]} expects {data.nbytes:,} bytes "
                f"of {data.kind.name} ({expected}), rank {rank} has sent {nbytes:,} bytes of "
                f"{name_of(KIND_NAMES, kind)}"
            )
        self._run.members[rank].memory.read(offset, data.bytes)
        data.put_back()
        self._received[sender] = (count + 1) & WORD_MASK
        fence()
        self._areas[self.me].publish(self._taken_word(sender), count + 1)
        return True

    def _open(self, rank: int, waiting: Receive | None = None) -> bool:
        """Have another rank's part of the mailbox mapped; False when it has none yet and nothing waits for it."""
        if rank not in self._areas:
            peer = self.ranks[rank]
            if waiting is None and not self._run.offered(peer, self._name):
                return False
            self._areas[rank] = self._run.find(peer, self._name, self._nbytes, lambda: self._describe(waiting))
        return True

    def _describe(self, waiting: Receive | None) -> tuple[str, list[int]]:
        if waiting is None:
            return f"a message in the group of ranks {self.ranks}", []
        sender = self.ranks[waiting.sender]
        return f"recv of {waiting} from rank {sender} in the group of ranks {self.ranks}", [sender]

    def _taken_word(self, sender: int) -> int:
        return (len(self.ranks) + sender) * _LINE

    def _note_at(self, to: int, count: int) -> int:
        return self._rings_at + (to * _RING + count % _RING) * _NOTE.size


class Receive:
    """A message to come; one of paddle's tasks.

    Args:
        num_parts: it fills the part `index` of so many equal ones of the tensor.
        sender: rank in the group.
    """

    def __init__(self, mailbox: Mailbox, tensor: Any, sender: int, num_parts: int = 1, index: int = 0) -> None:
        self._mailbox, self._tensor, self.sender = mailbox, tensor, sender
        self._num_parts, self._index, self.done = num_parts, index, False

    def memory(self) -> TensorMemory:
        """Where it goes. Looked up on arrival: the tensor may have got other memory since it was given."""
        return TensorMemory(self._tensor, output=True).part(self._num_parts, self._index)

    def wait(self, *_: Any) -> bool:
        """Until it is in the tensor."""
        self._mailbox.complete(self)
        return True

    def is_completed(self) -> bool:
        """Whether it is in the tensor; takes it if it has come."""
        self._mailbox.take_what_is_there()
        return self.done

    synchronize = wait

    def is_sync(self) -> bool:
        """Whether the operation was asked to be synchronous."""
        return False

    def __str__(self) -> str:
        part = f" (part {self._index} of {self._num_parts})" if self._num_parts > 1 else ""
        return f"{kind_of(self._tensor.dtype).name} {list(self._tensor.shape)}{part}"
