"""Packing: several short examples in one row, so that a batch holds tokens in place of padding.

Packs are made once, from the lengths and the seed alone: the same on every rank, under every plan and batch size, and
after a resume. Training then counts packs as samples, and an epoch of packs holds each example once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import paddle

from oarlock.data.examples.labels import Example
from oarlock.errors import DataError

Pack = tuple[Example, ...]
COMPARED_BATCH = 8  # not the run's: whether packing pays must not depend on how many ranks share a batch


class Examples(Protocol):
    """What packs are made of."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens of each."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Packs:
    """Which examples lie together.

    Attributes:
        members: int64 [examples], indices of the examples, those of a pack side by side.
        offsets: int64 [packs + 1], pack i is members[offsets[i] : offsets[i + 1]].
    """

    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.members[self.offsets[index] : self.offsets[index + 1]]


def make_packs(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Best fit decreasing: the longest example first, each into the fullest pack that still has room for it.

    Examples of equal length are interchangeable here, so whole runs of them are placed at once; which of them goes
    where is drawn from the seed. Never needs more than 11/9 of the fewest possible packs (Johnson et al. 1974).

    Args:
        lengths: int64 [examples], tokens of each.
        capacity: tokens of a pack; a longer example has a pack of its own.
    """
    sizes = np.minimum(lengths, capacity)
    # RandomState's stream is frozen by NumPy's policy (NEP 19).
    shuffled = np.random.RandomState(seed).permutation(len(sizes))
    falling = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(sizes[falling], prepend=-1))
    pack_of = np.empty(len(sizes), np.int64)
    room = _Room(capacity)
    for run in np.split(falling, starts[1:]) if len(falling) else []:
        pack_of[run] = room.place(int(sizes[run[0]]), len(run))
    members = np.argsort(pack_of, kind="stable")
    return Packs(members, np.concatenate([[0], np.bincount(pack_of, minlength=room.num_packs).cumsum()]))


class _Room:
    """Packs by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_packs = capacity, 0
        self._counts = np.zeros(capacity + 1, np.int64)  # packs with so much room
        self._packs: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]

    def place(self, size: int, count: int) -> np.ndarray:
        """int64 [count], the pack of each of so many examples of one size."""
        placed = []
        while count:
            found = np.flatnonzero(self._counts[size:])
            room = size + int(found[0]) if len(found) else self.capacity
            each = room // size  # once begun, a pack is the fullest with room until it has none
            wanted = -(-count // each)
            packs = self._take(room, wanted) if len(found) else self._open(wanted)
            taken = np.repeat(packs, each)[:count]
            placed.append(taken)
            count -= len(taken)
            last = len(taken) - each * (len(packs) - 1)
            self._give(room - each * size, packs[:-1])
            self._give(room - last * size, packs[-1:])
        return np.concatenate(placed)

    def _open(self, count: int) -> np.ndarray:
        self.num_packs += count
        return np.arange(self.num_packs - count, self.num_packs)

    def _take(self, room: int, wanted: int) -> np.ndarray:
        packs = np.concatenate(self._packs[room])
        self._packs[room] = [packs[wanted:]]
        taken = packs[:wanted]
        self._counts[room] -= len(taken)
        return taken

    def _give(self, room: int, packs: np.ndarray) -> None:
        if len(packs):
            self._packs[room].append(packs)
            self._counts[room] += len(packs)


class PackedDataset(paddle.io.Dataset):
    """Item i is a Pack.

    Args:
        examples: not copied.
        capacity: tokens of a pack; None for as many as the longest example has.

    Attributes:
        capacity: of the packs.
    """

    def __init__(self, examples: Examples, capacity: int | None, seed: int) -> None:
        super().__init__()
        self.examples = examples
        self._lengths = examples.lengths
        if not len(self._lengths):
            raise DataError("--packing: there is no example to pack")
        self.capacity = capacity or int(self._lengths.max())
        self.packs = make_packs(self._lengths, self.capacity, seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        return tuple(self.examples[int(member)] for member in self.packs[index])

    def fill(self) -> tuple[float, float]:
        """Share of real tokens in batches of COMPARED_BATCH packs, and in padded batches of as many examples."""
        of_packs = np.add.reduceat(self._lengths[self.packs.members], self.packs.offsets[:-1])
        return padded_fill(of_packs, COMPARED_BATCH, 0), padded_fill(self._lengths, COMPARED_BATCH, 0)

    def describe(self) -> str:
        """One line for the log: packs, how full batches of them are, and how full padded batches would be."""
        packed, padded = self.fill()
        examples, count = len(self._lengths), len(self)
        return (
            f"packing: {examples:,} examples in {count:,} packs of {self.capacity:,} tokens, {examples / count:.1f} a "
            f"pack, {packed:.1%} full (padded batches of {COMPARED_BATCH}: {padded:.1%}); samples, steps and epochs "
            "count packs"
        )


def padded_fill(lengths: np.ndarray, batch_size: int, seed: int) -> float:
    """Share of real tokens in batches of rows of these lengths in random order, padded to the longest of each."""
    order = np.random.RandomState(seed).permutation(len(lengths))
    heads = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths[order], heads)
    return float(lengths.sum() / (longest * np.diff(heads, append=len(lengths))).sum())
