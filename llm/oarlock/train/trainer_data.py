"""The PaddleNLP Trainer with data that goes on at a sample, whatever the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle.io import DataLoader
from paddlenlp.trainer import Trainer

from oarlock.data.corpus.blend import ConcatenatedDataset
from oarlock.data.corpus.order import MOST_EPOCHS, SampleOrder
from oarlock.data.corpus.sampler import EvaluationBatchSampler, ResumableBatchSampler
from oarlock.data.examples.worker_errors import TellingCollator, TellingDataset, TellingSampler, checked_batches
from oarlock.environment.signals import die_with_parent
from oarlock.errors import CheckpointError
from oarlock.train.checkpoint.resume import ResumePoint
from oarlock.train.evaluation.best import BestEvaluation
from oarlock.train.intervals import Progress
from oarlock.train.schedule import total_steps

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig


def samples_of_a_step(args: Any) -> int:
    """Samples of one optimizer step over all ranks, by PaddleNLP's TrainingArguments."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size


def steps_of_a_run(config: RunConfig, args: Any, order: SampleOrder, resume: ResumePoint | None) -> int:
    """Optimizer steps of the whole run, those done included.

    Raises:
        CheckpointError: when the run can't have come so far.
    """
    done, samples = (resume.manifest.step, resume.manifest.samples) if resume else (0, 0)
    if resume and samples // order.num_samples >= MOST_EPOCHS:
        raise CheckpointError(
            f"{resume.folder}: its manifest says {samples:,} samples, more passes over the {order.num_samples:,} of "
            "the data than any run makes"
        )
    return total_steps(config.schedule, order.num_samples, samples_of_a_step(args), done, samples)


class _CheckedLoader(DataLoader):
    """A loader that ends with an error where a batch could not be read."""

    dataset: Any
    collate_fn: Any
    batch_sampler: Any

    def __iter__(self) -> Iterator[Any]:
        own = self.dataset, self.collate_fn, self.batch_sampler
        self.dataset, self.collate_fn = TellingDataset(self.dataset), TellingCollator(self.collate_fn)
        self.batch_sampler = TellingSampler(self.batch_sampler)
        try:
            batches = super().__iter__()  # takes all three
        finally:
            self.dataset, self.collate_fn, self.batch_sampler = own
        return checked_batches(batches)


class FeedingTrainer(Trainer):
    """Which samples a rank sees, and sums over those that see different ones; OarlockTrainer sets the attributes."""

    config: RunConfig
    order: SampleOrder | None
    resume: ResumePoint | None
    progress: Progress
    best: BestEvaluation

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return samples_of_a_step(self.args)

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run; those done already, where it was stopped early."""
        assert self.order is not None
        if self.resume and self.best.exhausted:
            return self.resume.manifest.step
        return steps_of_a_run(self.config, self.args, self.order, self.resume)

    def get_train_dataloader(self) -> Any:
        """The Trainer's, which leaves nothing behind."""
        loader = super().get_train_dataloader()
        return self._settled(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The same for evaluation."""
        return self._settled(super().get_eval_dataloader(eval_dataset))

    @staticmethod
    def _settled(loader: Any) -> Any:
        """Nothing outlives this process when it is killed: no workers, and no batches in /dev/shm (ids are small). And
        a failure of a process that reads becomes an error of this one."""
        loader.worker_init_fn = lambda _: die_with_parent()
        loader.use_shared_memory = False
        loader.__class__ = _CheckedLoader
        return loader

    def _get_train_sampler(self) -> ResumableBatchSampler:
        assert self.order is not None
        done = self.resume.manifest.step if self.resume else 0
        return ResumableBatchSampler(
            self.order,
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            max(1, self.args.dataset_world_size),
            self.args.dataset_rank if self.args.world_size > 1 else 0,
            self.progress.samples,
            steps_done=done,
            steps_left=self.planned_steps() - done,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> EvaluationBatchSampler:
        replicas = max(1, self.args.dataset_world_size)
        replica = self.args.dataset_rank if self.args.world_size > 1 else 0
        sizes = eval_dataset.sizes if isinstance(eval_dataset, ConcatenatedDataset) else [len(eval_dataset)]
        limit = self.args.max_evaluate_steps
        return EvaluationBatchSampler(sizes, self.args.per_device_eval_batch_size, replicas, replica, limit)

    def sum_over_data_ranks(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks that see different data (those that split a model see the same)."""
        if self.args.world_size <= 1:
            return list(numbers)
        total = paddle.to_tensor(numbers, dtype="float64")
        paddle.distributed.all_reduce(total)
        copies = self.args.world_size // max(1, self.args.dataset_world_size)
        return [float(number) / copies for number in total]

    def _mean_loss(self) -> float:
        """Sum of the step losses since the last row, mean over the ranks."""
        return self.sum_over_data_ranks([self.progress.window_loss])[0] / max(1, self.args.dataset_world_size)
