"""Several data sets as one: what names them, whose turn it is, and how they stand beside each other in evaluations."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import paddle
from fast_dataindex import helpers

from oarlock.data.corpus.order import SampleOrder, StreamOrder
from oarlock.environment.console import get_logger
from oarlock.errors import DataError

logger = get_logger(__name__)

ALL = "all"  # in place of a weight: as much as the set holds


class SizedDataset(Protocol):
    """What sets are made of."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def parse_blend(text: str, flag: str, is_there: Callable[[str], bool]) -> list[tuple[float | None, str]]:
    """(weight, name) pairs of 'w1 name1 w2 name2 ...'; one pair of weight 1 for a name alone. None stands for `all`.

    Names with spaces stand in quotes. A text that is there as a whole is a name, whatever it looks like.

    Raises:
        DataError: when the text is no blend, or a weight is not a number above 0.
    """
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that is not closed: a name
        words = [text]
    if len(words) <= 1 or is_there(text):
        return [(1.0, text if is_there(text) or not words else words[0])]
    if len(words) % 2 or not re.match(r"all$|[-+.\d]", words[0]):
        raise DataError(
            f'{flag} {text}: not there, nor a blend, which is "weight1 name1 weight2 name2 ..." (names with spaces in '
            "quotes of their own)"
        )
    pairs = [(_weight(weight, name, flag), name) for weight, name in zip(words[::2], words[1::2], strict=True)]
    if len({weight is None for weight, _ in pairs}) > 1:
        raise DataError(f"{flag} {text}: give each set a weight, or each of them `{ALL}`")
    return pairs


def _weight(text: str, name: str, flag: str) -> float | None:
    if text == ALL:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise DataError(f"{flag}: weight {text!r} of {name} must be a number above 0, or `{ALL}` for each set")
    return value


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart, for figures and messages."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)}#{i + 1}" for i, part in enumerate(parts)]  # the same one twice


def shares_of(weights: Sequence[float | None], sizes: Sequence[int]) -> list[float]:
    """Each set's share of the samples, sum 1."""
    given = [float(size) if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]
    return [weight / sum(given) for weight in given]


class BlendedDataset(paddle.io.Dataset):
    """An endless mix of datasets by weight: item i comes from the dataset that is furthest behind its share.

    The choice at i does not depend on how many items follow (fast_dataindex's build_blending_indices is greedy), so
    the table is made longer as positions ask for it. Each dataset goes through its own epochs. The length is that of
    all datasets together, one epoch of the mix by convention.
    """

    def __init__(self, datasets: Sequence[SizedDataset], weights: Sequence[float], seed: int) -> None:
        self.datasets = list(datasets)
        self._shares = np.asarray(weights, np.float64) / sum(weights)
        self._orders = [SampleOrder(len(dataset), seed + i) for i, dataset in enumerate(datasets)]
        self._which, self._item = np.zeros(0, np.int16), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self._which):
            self._lengthen(max(index + 1, 2 * len(self._which), 1 << 16))
        which = self._which[index]
        return self.datasets[which][self._orders[which][int(self._item[index])]]

    def _lengthen(self, size: int) -> None:
        self._which, self._item = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(self._which, self._item, self._shares, len(self.datasets), size, False)


class ConcatenatedDataset(paddle.io.Dataset):
    """Datasets one after the other, each seen once; evaluations tell them apart by name.

    Attributes:
        names: of the datasets; one name for a single one.
        sizes: their lengths.
        shares: what each counts in the figures of the whole, sum 1; by default by its size.
    """

    def __init__(self, datasets: Sequence[SizedDataset], names: Sequence[str], shares: Sequence[float] = ()) -> None:
        self.datasets, self.names = list(datasets), list(names)
        self.sizes = [len(dataset) for dataset in self.datasets]
        self.shares = [share / sum(shares or self.sizes) for share in shares or self.sizes]
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[which][index - int(self._ends[which - 1] if which else 0)]


def blend(
    datasets: Sequence[SizedDataset], names: Sequence[str], weights: Sequence[float | None], seed: int
) -> tuple[Any, SampleOrder]:
    """One training set, and the order of its samples, of one or several; says the share of each.

    Sets of weight None (`all`) are seen each sample once an epoch. With weights an epoch is as many samples as all sets
    hold together: one with more weight than its size goes through its samples more than once in it, one with less
    does not come to its end.
    """
    if len(datasets) == 1:
        return datasets[0], SampleOrder(len(datasets[0]), seed)
    sizes = [len(dataset) for dataset in datasets]
    shares = shares_of(weights, sizes)
    for name, share, size in zip(names, shares, sizes, strict=True):
        rounds = share * sum(sizes) / size
        logger.info(f"blend: {share:.1%} {name} ({size:,} samples, {rounds:.2f} times an epoch)")
    given = [weight for weight in weights if weight is not None]
    if not given:
        return ConcatenatedDataset(datasets, names, shares), SampleOrder(sum(sizes), seed)
    mixed = BlendedDataset(datasets, given, seed)
    return mixed, StreamOrder(len(mixed))
