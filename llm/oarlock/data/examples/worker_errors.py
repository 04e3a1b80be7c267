"""Failures of reading a sample, passed from the process that reads to the one that trains.

Paddle's DataLoader loses them: an exception in a worker kills the queue that the training waits at, which then hangs or
dies without the message. Here a batch that could not be made is a batch that says so.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.errors import DataError, OarlockError, TrainingError

_TOLD = "failure"  # a batch's only field, bytes of the message


class _Failed:
    """In place of a sample."""

    def __init__(self, message: str) -> None:
        self.message = message


class TellingDataset:
    """A dataset whose samples may be failures, which TellingCollator knows.

    Args:
        dataset: whose samples are read by index.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, _Failed):
            return index
        try:
            return self.dataset[index]
        except Exception as error:
            return _Failed(_text(error, f"sample {index:,} can't be read"))


class TellingSampler:
    """A batch sampler that ends with a batch that says why it can't go on, which TellingDataset knows.

    Args:
        sampler: of lists of indices.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            yield from self.sampler
        except Exception as error:
            yield [_Failed(_text(error, "the next samples can't be chosen"))]


class TellingCollator:
    """A collator that makes a batch of a failure too."""

    def __init__(self, collator: Callable[[Sequence[Any]], Mapping[str, np.ndarray]]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> Mapping[str, np.ndarray]:
        """The collator's batch, or one that says what went wrong."""
        failed = next((sample for sample in samples if isinstance(sample, _Failed)), None)
        if failed is not None:
            return _batch(failed.message)
        try:
            return self.collator(samples)
        except Exception as error:
            return _batch(_text(error, "a batch can't be put together"))


def checked_batches(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches of a loader, up to one that is a failure.

    Raises:
        DataError: with the message of the process that read it.
        TrainingError: when such a process died.
    """
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (SystemError, RuntimeError) as error:  # what Paddle raises when a worker is gone
            raise reader_died() from error
        if _TOLD in batch:
            raise DataError(np.asarray(batch[_TOLD]).astype(np.uint8).tobytes().decode("utf-8", "replace"))
        yield batch


def reader_died() -> TrainingError:
    """What to say when a process that reads data is gone (Paddle raises a SystemError, wherever the training is)."""
    return TrainingError(
        "a process that reads data (--dataloader_num_workers) ended unexpectedly: killed for its memory, or a data "
        "file was cut while it was read. Earlier checkpoints are intact, and the same command goes on from the newest"
    )


def _batch(message: str) -> dict[str, np.ndarray]:
    return {_TOLD: np.frombuffer(message.encode("utf-8", "replace"), np.uint8).astype(np.int64)}


def _text(error: Exception, what: str) -> str:
    if isinstance(error, OarlockError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
