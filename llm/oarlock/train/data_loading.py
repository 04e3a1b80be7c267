"""Data loaders and batch samplers of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paddle.io import DataLoader

from oarlock.data.corpus.blend import ConcatenatedDataset
from oarlock.data.corpus.order import SampleOrder
from oarlock.data.corpus.sampler import EvaluationBatchSampler, ResumableBatchSampler
from oarlock.data.examples.worker_errors import (
    ErrorCatchingCollator,
    ErrorCatchingDataset,
    ErrorCatchingSampler,
    raise_worker_errors,
)
from oarlock.environment.signals import die_with_parent
from oarlock.train.data_parallel import DataParallelRanks


class CheckedLoader(DataLoader):
    """A loader that raises a DataError if a batch can't be read."""

    dataset: Any
    collate_fn: Any
    batch_sampler: Any

    def __iter__(self) -> Iterator[Any]:
        own = self.dataset, self.collate_fn, self.batch_sampler
        self.dataset, self.collate_fn = ErrorCatchingDataset(self.dataset), ErrorCatchingCollator(self.collate_fn)
        self.batch_sampler = ErrorCatchingSampler(self.batch_sampler)
        try:
            batches = super().__iter__()  # reads all three
        finally:
            self.dataset, self.collate_fn, self.batch_sampler = own
        return raise_worker_errors(batches)


def make_checked_loader(loader: DataLoader) -> CheckedLoader:
    """Convert the Trainer's loader to a CheckedLoader, whose workers end when this process ends.

    Batches don't use shared memory, because a killed process would leave them in /dev/shm.
    """
    loader.worker_init_fn = lambda _: die_with_parent()
    loader.use_shared_memory = False
    loader.__class__ = CheckedLoader
    return loader


def make_training_sampler(
    order: SampleOrder, args: Any, ranks: DataParallelRanks, samples_done: int, steps_done: int, steps: int
) -> ResumableBatchSampler:
    """Create the sampler of the training data, starting after the samples before a resume.

    Args:
        args: PaddleNLP's TrainingArguments.
        samples_done, steps_done: progress before the resume.
        steps: steps of the whole run.
    """
    return ResumableBatchSampler(
        order,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        ranks.replicas,
        ranks.replica,
        samples_done,
        steps_done=steps_done,
        steps_left=steps - steps_done,
    )


def make_evaluation_sampler(
    dataset: Any, batch_size: int, limit: int, ranks: DataParallelRanks
) -> EvaluationBatchSampler:
    """Create the sampler of an evaluation set.

    Args:
        dataset: one set, or several as a ConcatenatedDataset.
        limit: largest number of batches per set; -1 for all.
    """
    sizes = dataset.sizes if isinstance(dataset, ConcatenatedDataset) else [len(dataset)]
    return EvaluationBatchSampler(sizes, batch_size, ranks.replicas, ranks.replica, limit)
