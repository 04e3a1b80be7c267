"""The batch samplers the Trainer gets, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from paddle.io import BatchSampler
from paddlenlp.utils.batch_sampler import DistributedBatchSampler

from oarlock.data.corpus.order import SampleOrder, micro_batches


class EvaluationBatchSampler(BatchSampler):
    """Every sample once over all data-parallel ranks, in order, and as many batches on each rank.

    The samples may be of several sets, one after the other; a batch is of one of them. Batch t of replica r holds the
    samples of its set from (t x replicas + r) x batch_size on, t counted from the set's first batch; where its samples
    end its first ones fill up, and `real(t)` says how many of a batch count. (Paddle's DistributedBatchSampler counts
    the fillers.)

    Args:
        sizes: samples of each set, all above 0.
        limit: batches of each set at most; -1 for all.
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
            wanted = self.batch_size if self.replicas > 1 else self.real(t)
            yield [before + (first + i) % size for i in range(wanted)]

    def __len__(self) -> int:
        return sum(self._counts)

    def part(self, t: int) -> int:
        """The set that batch t is of."""
        return self._place(t)[0]

    def real(self, t: int) -> int:
        """Samples of batch t that are not fillers; they come first."""
        part, first = self._place(t)
        return max(0, min(self.batch_size, self.sizes[part] - first))

    def _place(self, t: int) -> tuple[int, int]:
        """The set of batch t, and its first sample there."""
        part = 0
        while part + 1 < len(self._counts) and t >= self._counts[part]:
            t -= self._counts[part]
            part += 1
        return part, (t * self.replicas + self.replica) * self.batch_size


class ResumableBatchSampler(DistributedBatchSampler):
    """All micro-batches from `consumed_samples` to the end of the run, as one endless epoch.

    It is a PaddleNLP DistributedBatchSampler because the Trainer then does not read and drop the batches it skips on
    resume. The Trainer's own idea of the position (global_step x the present batch size) is wrong after a change of
    batch size and is not used.

    Args:
        order: sample of each position.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        replicas, replica: data-parallel ranks, and this one.
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
        """Samples of one optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.nranks

    def __iter__(self) -> Iterator[list[int]]:
        stop = self.start_sample + self.steps_left * self.global_batch
        return micro_batches(
            self.order, self.start_sample, stop, self.batch_size, self.accumulation, self.nranks, self.local_rank
        )

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before a resume included (the Trainer divides it into steps)."""
        return (self.steps_done + self.steps_left) * self.accumulation

    def set_epoch(self, epoch: int = 0, consumed_samples: int = 0) -> None:
        """Nothing to do: the position is start_sample."""
