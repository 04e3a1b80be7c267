"""The length of a run in optimizer steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from oarlock.data.corpus.order import MAX_EPOCHS, SampleOrder
from oarlock.errors import CheckpointError

if TYPE_CHECKING:
    from oarlock.config.run_config import RunConfig
    from oarlock.config.shared import ScheduleSection
    from oarlock.train.checkpoint.resume import ResumePoint


def count_samples_per_step(args: Any) -> int:
    """Samples of an optimizer step over all ranks; `args` are PaddleNLP's TrainingArguments."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size


def plan_steps(config: RunConfig, args: Any, order: SampleOrder, resume: ResumePoint | None) -> int:
    """Compute the optimizer steps of the whole run, including those before a resume.

    Args:
        args: PaddleNLP's TrainingArguments.
        order: order of the training data.

    Raises:
        CheckpointError: if the checkpoint claims more samples than any run consumes.
    """
    done, samples = (resume.manifest.step, resume.manifest.samples) if resume else (0, 0)
    if resume and samples // order.num_samples >= MAX_EPOCHS:
        raise CheckpointError(
            f"{resume.folder}: its manifest says {samples:,} samples, which is more epochs of the "
            f"{order.num_samples:,} training samples than a run can have"
        )
    return count_total_steps(config.schedule, order.num_samples, count_samples_per_step(args), done, samples)


def count_total_steps(
    schedule: ScheduleSection, num_samples: int, global_batch: int, steps_done: int, samples_done: int
) -> int:
    """Compute the optimizer steps of the whole run, including those done.

    --max_steps takes precedence. Otherwise every sample is trained num_train_epochs times, and the last step is
    completed from the following epoch. After a change of batch size the remaining samples decide.

    Args:
        num_samples: samples per epoch.
        global_batch: samples per step over all ranks.
        steps_done, samples_done: progress before a resume.
    """
    if schedule.max_steps > 0:
        return schedule.max_steps
    wanted = math.ceil(round(schedule.num_train_epochs * num_samples, 6))
    return steps_done + max(0, math.ceil((wanted - samples_done) / global_batch))
