"""Packing: several short examples share a row, which would otherwise be padded.

Packs depend only on the lengths and the seed. So they are the same on every rank, with every plan and batch size, and
after a resume. Training counts packs as samples. An epoch of packs contains each example once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import paddle

from oarlock.data.examples.labels import Example
from oarlock.errors import DataError

Pack = tuple[Example, ...]
COMPARED_BATCH = 8  # fixed, so that the decision to pack does not depend on the number of ranks


class Examples(Protocol):
    """Examples that can be packed."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64 [examples]."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Packs:
    """The assignment of examples to packs.

    Attributes:
        members: indices of the examples, ordered by pack, int64 [examples].
        offsets: pack i is members[offsets[i] : offsets[i + 1]], int64 [packs + 1].
    """

    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.members[self.offsets[index] : self.offsets[index + 1]]


def make_packs(lengths: np.ndarray, capacity: int, seed: int) -> Packs:
    """Assign examples to packs by best fit decreasing: longest first, each into the fullest pack it fits into.

    Examples of equal length are interchangeable, so they are placed together, in an order drawn from the seed. The
    number of packs is asymptotically at most 11/9 of the optimum (Johnson et al. 1974).

    Args:
        lengths: number of tokens of each example, int64 [examples].
        capacity: tokens of a pack. A longer example gets a pack of its own.
    """
    sizes = np.minimum(lengths, capacity)
    # RandomState's stream is frozen by NumPy's policy (NEP 19).
    shuffled = np.random.RandomState(seed).permutation(len(sizes))
    falling = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(sizes[falling], prepend=-1))
    pack_of = np.empty(len(sizes), np.int64)
    space = _FreeSpace(capacity)
    for run in np.split(falling, starts[1:]) if len(falling) else []:
        pack_of[run] = space.place(int(sizes[run[0]]), len(run))
    members = np.argsort(pack_of, kind="stable")
    return Packs(members, np.concatenate([[0], np.bincount(pack_of, minlength=space.num_packs).cumsum()]))


class _FreeSpace:
    """Packs by their free space, in tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.num_packs = capacity, 0
        self._counts = np.zeros(capacity + 1, np.int64)  # number of packs with this much space
        self._packs: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]

    def place(self, size: int, count: int) -> np.ndarray:
        """Place `count` examples of one size. Returns the pack of each, int64 [count]."""
        placed = []
        while count:
            found = np.flatnonzero(self._counts[size:])
            space = size + int(found[0]) if len(found) else self.capacity
            each = space // size  # the pack chosen remains the best fit until it is full
            wanted = -(-count // each)
            if len(found):
                packs = self._take(space, wanted)
            else:
                packs = np.arange(self.num_packs, self.num_packs + wanted)
                self.num_packs += wanted
            taken = np.repeat(packs, each)[:count]
            placed.append(taken)
            count -= len(taken)
            last = len(taken) - each * (len(packs) - 1)
            self._return(space - each * size, packs[:-1])
            self._return(space - last * size, packs[-1:])
        return np.concatenate(placed)

    def _take(self, space: int, wanted: int) -> np.ndarray:
        packs = np.concatenate(self._packs[space])
        self._packs[space] = [packs[wanted:]]
        taken = packs[:wanted]
        self._counts[space] -= len(taken)
        return taken

    def _return(self, space: int, packs: np.ndarray) -> None:
        if len(packs):
            self._packs[space].append(packs)
            self._counts[space] += len(packs)


class PackedDataset(paddle.io.Dataset):
    """A dataset of packs.

    Args:
        examples: not copied.
        capacity: tokens of a pack; None for the length of the longest example.

    Raises:
        DataError: if there are no examples.
    """

    def __init__(self, examples: Examples, capacity: int | None, seed: int) -> None:
        super().__init__()
        self.examples = examples
        self._lengths = examples.lengths
        if not len(self._lengths):
            raise DataError("--packing: there are no examples to pack")
        self.capacity = capacity or int(self._lengths.max())
        self.packs = make_packs(self._lengths, self.capacity, seed)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        return tuple(self.examples[int(member)] for member in self.packs[index])

    def measure_fill(self) -> tuple[float, float]:
        """Return the fraction of real tokens in batches of COMPARED_BATCH packs, and in those of as many examples."""
        of_packs = np.add.reduceat(self._lengths[self.packs.members], self.packs.offsets[:-1])
        return measure_padded_fill(of_packs, COMPARED_BATCH, 0), measure_padded_fill(self._lengths, COMPARED_BATCH, 0)

    def describe(self) -> str:
        """Return one line for the log: the packs, and how full batches are with and without packing."""
        packed, padded = self.measure_fill()
        examples, count = len(self._lengths), len(self)
        return (
            f"packing: {examples:,} examples in {count:,} packs of {self.capacity:,} tokens, {examples / count:.1f} "
            f"per pack, {packed:.1%} full (padded batches of {COMPARED_BATCH}: {padded:.1%}); samples, steps and "
            "epochs count packs"
        )


def measure_padded_fill(lengths: np.ndarray, batch_size: int, seed: int) -> float:
    """Return the fraction of real tokens in batches in random order, each padded to its longest row."""
    order = np.random.RandomState(seed).permutation(len(lengths))
    heads = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths[order], heads)
    return float(lengths.sum() / (longest * np.diff(heads, append=len(lengths))).sum())
