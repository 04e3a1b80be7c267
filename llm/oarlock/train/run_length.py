"""How many optimizer steps a run has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.order import MOST_EPOCHS, SampleOrder
from oarlock.errors import CheckpointError

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.config.shared import ScheduleSection
    from oarlock.train.checkpoint.resume import ResumePoint


def samples_per_step(args: Any) -> int:
    """Samples of one optimizer step over all ranks, from PaddleNLP's TrainingArguments."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size


def planned_steps(config: RunConfig, args: Any, order: SampleOrder, resume: ResumePoint | None) -> int:
    """Optimizer steps of the whole run, those before a resume included.

    Args:
        args: PaddleNLP's TrainingArguments.
        order: of the training data.

    Raises:
        CheckpointError: when the checkpoint claims more samples than any run sees.
    """
    done, samples = (resume.manifest.step, resume.manifest.samples) if resume else (0, 0)
    if resume and samples // order.num_samples >= MOST_EPOCHS:
        raise CheckpointError(
            f"{resume.folder}: its manifest says {samples:,} samples, more passes over the {order.num_samples:,} of "
            "the data than any run makes"
        )
    return total_steps(config.schedule, order.num_samples, samples_per_step(args), done, samples)


def total_steps(
    schedule: ScheduleSection, num_samples: int, global_batch: int, steps_done: int, samples_done: int
) -> int:
    """Optimizer steps of the whole run, those done included.

    With --max_steps it is that. Otherwise every sample is to be seen num_train_epochs times; the last step is filled
    up from the following epoch. After a change of batch size the samples that are left decide.

    Args:
        num_samples: samples of an epoch.
        global_batch: samples of one step over all ranks.
        steps_done, samples_done: progress before a resume.
    """
    if schedule.max_steps > 0:
        return schedule.max_steps
    wanted = math.ceil(round(schedule.num_train_epochs * num_samples, 6))
    return steps_done + max(0, math.ceil((wanted - samples_done) / global_batch))
