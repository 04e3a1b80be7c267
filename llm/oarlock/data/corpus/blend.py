"""Blending several datasets by weight, and evaluating them separately."""

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

ALL = "all"  # used in place of a weight: each sample once per epoch


class SizedDataset(Protocol):
    """A dataset with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def parse_blend(text: str, flag: str, is_there: Callable[[str], bool]) -> list[tuple[float | None, str]]:
    """Parse 'w1 name1 w2 name2 ...' to (weight, name) pairs. A single name has weight 1. None means `all`.

    Names with spaces are quoted. A text that exists as a path is a name, whatever it looks like.

    Raises:
        DataError: if the text is not a blend, or a weight is not a number above 0.
    """
    try:
        words = shlex.split(text)
    except ValueError:  # an unclosed quote: the text is a name
        words = [text]
    if len(words) <= 1 or is_there(text):
        return [(1.0, text if is_there(text) or not words else words[0])]
    if len(words) % 2 or not re.match(r"all$|[-+.\d]", words[0]):
        raise DataError(
            f'{flag} {text}: it does not exist and is not a blend "weight1 name1 weight2 name2 ..." (quote '
            "names with spaces)"
        )
    pairs: list[tuple[float | None, str]] = []
    for weight, name in zip(words[::2], words[1::2], strict=True):
        try:
            value = None if weight == ALL else float(weight)
        except ValueError:
            value = -1.0
        if value is not None and not 0 < value < float("inf"):
            raise DataError(f"{flag}: weight {weight!r} of {name} must be a number above 0, or `{ALL}` for each set")
        pairs.append((value, name))
    if len({weight is None for weight, _ in pairs}) > 1:
        raise DataError(f"{flag} {text}: give each set a weight, or each of them `{ALL}`")
    return pairs


def make_short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest suffixes of paths that are distinct, for metrics and messages."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)}#{i + 1}" for i, part in enumerate(parts)]  # one path appears twice


def compute_shares(weights: Sequence[float | None], sizes: Sequence[int]) -> list[float]:
    """Return the fraction of samples of each dataset (sum 1)."""
    given = [float(size) if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]
    return [weight / sum(given) for weight in given]


class BlendedDataset(paddle.io.Dataset):
    """An endless blend of datasets by weight: item i comes from the dataset that is furthest behind its weight.

    The choice at i does not depend on the number of items after it (fast_dataindex's build_blending_indices is greedy),
    so the table grows on demand. Each dataset has its own epochs. The length, one epoch of the blend by convention, is
    the sum of the lengths.
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
            size = max(index + 1, 2 * len(self._which), 1 << 16)
            self._which, self._item = np.zeros(size, np.int16), np.zeros(size, np.int64)
            helpers.build_blending_indices(self._which, self._item, self._shares, len(self.datasets), size, False)
        which = self._which[index]
        return self.datasets[which][self._orders[which][int(self._item[index])]]


class ConcatenatedDataset(paddle.io.Dataset):
    """Concatenated datasets. Evaluation reports each by name.

    Attributes:
        names: of the datasets.
        sizes: their lengths.
        shares: weight of each in the overall metrics (sum 1). By default its size.
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
    """Make one training dataset and its order of samples from one or several datasets. Logs the share of each.

    With weight None (`all`), each sample is used once per epoch. With weights, an epoch has as many samples as all
    datasets together. A dataset whose weight exceeds its size is repeated; one with less weight is not used completely.
    """
    if len(datasets) == 1:
        return datasets[0], SampleOrder(len(datasets[0]), seed)
    sizes = [len(dataset) for dataset in datasets]
    shares = compute_shares(weights, sizes)
    for name, share, size in zip(names, shares, sizes, strict=True):
        rounds = share * sum(sizes) / size
        logger.info(f"blend: {share:.1%} {name} ({size:,} samples, {rounds:.2f} times per epoch)")
    given = [weight for weight in weights if weight is not None]
    if not given:
        return ConcatenatedDataset(datasets, names, shares), SampleOrder(sum(sizes), seed)
    mixed = BlendedDataset(datasets, given, seed)
    return mixed, StreamOrder(len(mixed))
