"""--validation_split: holding out examples of training data that have no dev file.

The choice depends only on the content of the examples and the seed, so it is the same after a resume, on each rank and
for each plan. Identical examples are held out together or not at all.
"""

from __future__ import annotations

import hashlib

import numpy as np

from oarlock.data.corpus.lazy_sequence import StoredSequence
from oarlock.data.examples.example_cache import StoredExamples
from oarlock.data.examples.labels import Example
from oarlock.errors import DataError


def hold_out(examples: StoredExamples, amount: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out, both int64 and ascending.

    Args:
        amount: a share of the examples (below 1), or their number.
        name: of the dataset, for messages.

    Raises:
        DataError: if nothing would be left to train on.
    """
    total = len(examples)
    wanted = max(1, round(amount * total)) if amount < 1 else int(amount)
    salt = str(seed).encode()
    keys = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(content, key=salt, digest_size=8).digest(), "little")
            for content in examples.hash_contents()
        ),
        np.uint64,
        total,
    )
    if wanted >= total:
        raise DataError(f"{name}: --validation_split {amount:g} of {total:,} example(s) leaves nothing to train on")
    threshold = np.sort(keys)[wanted - 1]
    held = keys <= threshold  # identical examples have the same key
    if held.all():
        raise DataError(f"{name}: --validation_split {amount:g}: all {total:,} examples are identical")
    return np.flatnonzero(~held), np.flatnonzero(held)


class ChosenExamples(StoredSequence[Example]):
    """A subset of the examples of a folder, in order."""

    def __init__(self, examples: StoredExamples, indices: np.ndarray) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read_element(self, index: int) -> Example:
        """Return an example."""
        return self.examples[int(self.indices[index])]

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of each example, int64 [examples]."""
        return self.examples.lengths[self.indices]

    def locate(self, index: int) -> str:
        """Return the file:line of the record of an example."""
        return self.examples.locate(int(self.indices[index]))
