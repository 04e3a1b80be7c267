"""Batch samplers for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paddle.io import BatchSampler
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from oarlock.data.corpus.order import SampleOrder, iterate_micro_batches


class EvaluationBatchSampler(BatchSampler):
    """Visits every sample once over all data-parallel ranks, in order, with the same number of batches on each rank.

    The samples may belong to several concatenated datasets. A batch belongs to one of them. Batch t of replica r holds
    the samples of its dataset from (t x replicas + r) x batch_size on, with t counted from the dataset's first batch.
    The last batch is padded with the first samples, and `count_real(t)` is the number of samples that are not padding.
    (Paddle's DistributedBatchSampler counts the padding.)

    Args:
        sizes: number of samples of each dataset, all above 0.
        limit: largest number of batches per dataset; -1 for all.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, replicas: int = 1, replica: int = 0, limit: int = -1
    ) -> None:
        self.sizes, self.batch_size, self.replicas, self.replica = list(sizes), batch_size, replicas, replica
        counts = [-(-size // (batch_size * replicas)) for size in self.sizes]
        self._counts = [min(count, limit) for count in counts] if limit > 0 else counts

    def __iter__(self) -> Iterator[list[int]]:
        for t in range(len(self)):
            part, first = self._place(t)
            size, before = self.sizes[part], sum(self.sizes[:part])
            wanted = self.batch_size if self.replicas > 1 else self.count_real(t)
            yield [before + (first + i) % size for i in range(wanted)]

    def __len__(self) -> int:
        return sum(self._counts)

    def find_dataset(self, t: int) -> int:
        """Return the index of the dataset of batch t."""
        return self._place(t)[0]

    def count_real(self, t: int) -> int:
        """Return the number of samples of batch t that are not padding; they come first."""
        part, first = self._place(t)
        return max(0, min(self.batch_size, self.sizes[part] - first))

    def _place(self, t: int) -> tuple[int, int]:
        """Return the dataset of batch t, and its first sample in that dataset."""
        part = 0
        while part + 1 < len(self._counts) and t >= self._counts[part]:
            t -= self._counts[part]
            part += 1
        return part, (t * self.replicas + self.replica) * self.batch_size


class ResumableBatchSampler(DistributedBatchSampler):
    """All micro-batches from `start_sample` to the end of the run, as one epoch.

    It subclasses PaddleNLP's DistributedBatchSampler because the Trainer then does not read and drop the batches that
    it skips on resume. The Trainer computes the position as global_step x the current batch size. That is wrong after
    a change of the batch size, and is not used.

    Args:
        order: maps positions to samples.
        batch_size: samples per micro-batch.
        accumulation: micro-batches per step.
        replicas, replica: number of data-parallel ranks, and this one.
        start_sample: position of the first sample to use.
        steps_done, steps_left: optimizer steps before and after start_sample.
    """

    def __init__(
        self,
        order: SampleOrder,
        batch_size: int,
        accumulation: int,
        replicas: int,
        replica: int,
        start_sample: int,
        steps_done: int,
        steps_left: int,
    ) -> None:
        self.order, self.batch_size, self.accumulation = order, batch_size, accumulation
        self.nranks, self.local_rank = replicas, replica
        self.start_sample, self.steps_done, self.steps_left = start_sample, steps_done, steps_left
        self.drop_last, self.shuffle, self.epoch = True, True, 0

    @property
    def global_batch(self) -> int:
        """Number of samples of an optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.nranks

    def __iter__(self) -> Iterator[list[int]]:
        stop = self.start_sample + self.steps_left * self.global_batch
        return iterate_micro_batches(
            self.order, self.start_sample, stop, self.batch_size, self.accumulation, self.nranks, self.local_rank
        )

    def __len__(self) -> int:
        """Return the micro-batches of the complete run, those before a resume included; the Trainer derives steps."""
        return (self.steps_done + self.steps_left) * self.accumulation

    def set_epoch(self, epoch: int = 0, consumed_samples: int = 0) -> None:
        """Do nothing: the position is start_sample."""
