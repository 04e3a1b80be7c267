"""The order of samples: a pure function of seed and position.

The data position of a run is the number of samples consumed. It does not depend on batch size, accumulation or number
of ranks, which makes a resume exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_EPOCHS = 1 << 32  # the epoch is part of the seed of its order, and has 32 bits there


class SampleOrder:
    """An endless stream over a dataset of `num_samples`: each epoch visits every sample once, in its own order.

    Args:
        num_samples: samples of the dataset.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """Return the sample at a position of the stream."""
        epoch, place = divmod(position, self.num_samples)
        if epoch != self._epoch:
            # NumPy guarantees the stream of RandomState (NEP 19). That of default_rng may change between releases.
            permutation = np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)
            self._epoch, self._permutation = epoch, permutation
        return int(self._permutation[place])


class StreamOrder(SampleOrder):
    """The order of a dataset that is itself an endless stream (a blend): position i is item i.

    Args:
        num_samples: number of samples in an epoch.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples, seed=0)

    def __getitem__(self, position: int) -> int:
        return position


def iterate_micro_batches(
    order: SampleOrder, start: int, stop: int, batch_size: int, accumulation: int, replicas: int, replica: int
) -> Iterator[list[int]]:
    """Yield the micro-batches of one data-parallel rank for positions [start, stop), a multiple of the global batch.

    A step takes the next batch_size x accumulation x replicas positions, so every plan with the same global batch
    trains on the same samples in every step. Within the step, micro-batch a of replica r holds the positions
    [(a x replicas + r) x batch_size, ... + batch_size).
    """
    for first in range(start, stop, batch_size * accumulation * replicas):
        for micro in range(accumulation):
            begin = first + (micro * replicas + replica) * batch_size
            yield [order[position] for position in range(begin, begin + batch_size)]
