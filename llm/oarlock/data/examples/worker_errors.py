"""Errors of data-loading workers, passed to the training process.

Paddle's DataLoader loses them: an exception in a worker closes the queue on which training waits, so training hangs or
dies without the message. Here, a failed sample becomes a batch that holds the error message.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oarlock.errors import DataError, OarlockError, TrainingError

_FAILURE = "failure"  # the only field of a failed batch: the bytes of the message


class _Failed:
    """A failed sample."""

    def __init__(self, message: str) -> None:
        self.message = message


class ErrorCatchingDataset:
    """A dataset that returns errors as failed samples, for ErrorCatchingCollator."""

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
            return _Failed(_describe_error(error, f"sample {index:,} can't be read"))


class ErrorCatchingSampler:
    """A batch sampler that turns an error into a last batch with one failed sample, for ErrorCatchingDataset."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Any]]:
        try:
            yield from self.sampler
        except Exception as error:
            yield [_Failed(_describe_error(error, "the next samples can't be chosen"))]


class ErrorCatchingCollator:
    """A collator that makes a failed batch of failed samples and of its own errors."""

    def __init__(self, collator: Callable[[Sequence[Any]], Mapping[str, np.ndarray]]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> Mapping[str, np.ndarray]:
        """Return the collator's batch, or one with the error message."""
        failed = next((sample for sample in samples if isinstance(sample, _Failed)), None)
        if failed is not None:
            return _make_failed_batch(failed.message)
        try:
            return self.collator(samples)
        except Exception as error:
            return _make_failed_batch(_describe_error(error, "a batch can't be collated"))


def raise_worker_errors(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the batches of a loader up to the first failed one.

    Raises:
        DataError: with the message from the worker.
        TrainingError: if a worker died.
    """
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (SystemError, RuntimeError) as error:  # raised by Paddle after a worker died
            raise make_worker_error() from error
        if _FAILURE in batch:
            raise DataError(np.asarray(batch[_FAILURE]).astype(np.uint8).tobytes().decode("utf-8", "replace"))
        yield batch


def make_worker_error() -> TrainingError:
    """Make the error for a dead worker. Paddle raises a SystemError for it, at any point of the training."""
    return TrainingError(
        "a process that reads data (--dataloader_num_workers) ended unexpectedly: it ran out of memory, or a "
        "data file was truncated while it was read. Checkpoints are intact; the same command resumes from the newest"
    )


def _make_failed_batch(message: str) -> dict[str, np.ndarray]:
    return {_FAILURE: np.frombuffer(message.encode("utf-8", "replace"), np.uint8).astype(np.int64)}


def _describe_error(error: Exception, what: str) -> str:
    if isinstance(error, OarlockError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
