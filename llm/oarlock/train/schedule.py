"""Learning rate schedules, and how many steps a run has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from paddle.optimizer.lr import LambdaDecay, LRScheduler
from paddlenlp.transformers import CosineAnnealingWithWarmupDecay, LinearAnnealingWithWarmupDecay

if TYPE_CHECKING:
    from oarlock.config.sections import ScheduleSection


def total_steps(
    schedule: ScheduleSection, num_samples: int, global_batch: int, steps_done: int, samples_done: int
) -> int:
    """Optimizer steps of the whole run, those done included.

    With --max_steps it is that. Otherwise every sample is to be seen num_train_epochs times; the last step is filled
    up from the following epoch. After a change of batch size the samples that are left decide.

    Args:
        num_samples: samples of an epoch.
        global_batch: samples of one step over all ranks.
        steps_done, samples_done: where the run stands.
    """
    if schedule.max_steps > 0:
        return schedule.max_steps
    wanted = math.ceil(round(schedule.num_train_epochs * num_samples, 6))
    return steps_done + max(0, math.ceil((wanted - samples_done) / global_batch))


def warmup_steps(schedule: ScheduleSection, steps: int) -> int:
    """Steps of the linear rise: warmup_steps, or warmup_ratio of all."""
    return schedule.warmup_steps or int(schedule.warmup_ratio * steps)


def make_scheduler(schedule: ScheduleSection, steps: int) -> LRScheduler:
    """PaddleNLP's annealing schedules (they end at min_learning_rate), or a constant after the warm-up."""
    warmup = warmup_steps(schedule, steps)
    decay = max(schedule.decay_steps or steps, warmup + 1)
    if schedule.lr_scheduler_type == "cosine":
        return CosineAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    if schedule.lr_scheduler_type == "linear":
        return LinearAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    warm = warmup if schedule.lr_scheduler_type == "constant_with_warmup" or warmup else 0
    return LambdaDecay(schedule.learning_rate, lambda step: min(1.0, step / warm) if warm else 1.0)
