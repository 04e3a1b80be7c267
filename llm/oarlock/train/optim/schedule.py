"""Learning rate schedules, with the same rates as those of transformers."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from paddle.optimizer.lr import LambdaDecay, LRScheduler
from paddlenlp.transformers import CosineAnnealingWithWarmupDecay, LinearAnnealingWithWarmupDecay

from oarlock.config.shared import ScheduleSection
from oarlock.environment.console import log_once
from oarlock.errors import ConfigError


def warmup_steps(schedule: ScheduleSection, steps: int) -> int:
    """Steps of the linear warm-up: warmup_steps, or warmup_ratio of all steps, rounded up as in transformers."""
    return schedule.warmup_steps or math.ceil(steps * schedule.warmup_ratio)


def check_warmup(schedule: ScheduleSection, steps: int, done: int = 0) -> None:
    """Refuse a warm-up in steps that is as long as the run; only report one that is given as a ratio.

    Args:
        steps: steps of the whole run.
        done: steps before a resume.

    Raises:
        ConfigError: naming both numbers.
    """
    warmup = warmup_steps(schedule, steps)
    if steps <= done:
        return
    if schedule.decay_steps is not None and schedule.decay_steps <= warmup:
        raise ConfigError(f"--decay_steps {schedule.decay_steps} must be above the {warmup} steps of the warm-up")
    if schedule.warmup_steps >= steps:
        raise ConfigError(
            f"--warmup_steps {warmup:,} leaves no step of this run, which has {steps:,}: the learning rate would never "
            f"reach {schedule.learning_rate:g}. Use fewer steps (or --warmup_ratio), or train longer"
        )
    if warmup >= steps:
        log_once(
            f"--warmup_ratio {schedule.warmup_ratio:g} is {warmup:,} of this run's {steps:,} step(s): the learning "
            f"rate never reaches {schedule.learning_rate:g}"
        )


def make_scheduler(schedule: ScheduleSection, steps: int) -> LRScheduler:
    """PaddleNLP's annealing schedules, which end at min_learning_rate, or a constant rate after the warm-up.

    `constant` has a warm-up if one is requested; transformers and PaddleNLP silently ignore it there.
    """
    warmup = warmup_steps(schedule, steps)
    decay = max(schedule.decay_steps or steps, warmup + 1)
    if schedule.lr_scheduler_type == "cosine":
        return CosineAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    if schedule.lr_scheduler_type == "linear":
        return LinearAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    return LambdaDecay(schedule.learning_rate, lambda step: min(1.0, step / warmup) if warmup else 1.0)


def describe_rate_change(
    schedule: ScheduleSection, steps: int, before: dict[str, Any], steps_before: int, done: int
) -> str:
    """Describe how a resume changes the learning rate of the next step; "" if it does not.

    Args:
        schedule, steps: schedule and length of the resumed run.
        before, steps_before: options and length of the run that wrote the checkpoint.
        done: steps before the resume.
    """
    known = {field.name: before[field.name] for field in fields(ScheduleSection) if field.name in before}
    now, then = _learning_rate(schedule, steps, done), _learning_rate(ScheduleSection(**known), steps_before, done)
    if math.isclose(now, then, rel_tol=1e-9):
        return ""
    return (
        f"the learning rate changes: step {done + 1:,} has {now:.4g} in a run of {steps:,} steps; it had {then:.4g} in "
        f"the run of {steps_before:,} steps that wrote the checkpoint"
    )


def _learning_rate(schedule: ScheduleSection, steps: int, done: int) -> float:
    """The rate of the step after `done` steps."""
    scheduler = make_scheduler(schedule, steps)
    scheduler.step(done)
    return float(scheduler())
