"""Learning rate schedules. For the same options the rates are those of transformers."""

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
    """Steps of the linear rise: warmup_steps, or warmup_ratio of all rounded up (as transformers rounds it)."""
    return schedule.warmup_steps or math.ceil(steps * schedule.warmup_ratio)


def check_warmup(schedule: ScheduleSection, steps: int, done: int = 0) -> None:
    """Refuse a warm-up that was given in steps and leaves none of the run; say it of one that was given as a share.

    Args:
        steps: of the whole run.
        done: steps that it has behind it.

    Raises:
        ConfigError: with both numbers.
    """
    warmup = warmup_steps(schedule, steps)
    if steps <= done:
        return
    if schedule.decay_steps is not None and schedule.decay_steps <= warmup:
        raise ConfigError(f"--decay_steps {schedule.decay_steps} must be above the {warmup} steps of the warm-up")
    if schedule.warmup_steps >= steps:
        raise ConfigError(
            f"--warmup_steps {warmup:,} leaves no step of this run, which has {steps:,}: the learning rate would never "
            f"reach {schedule.learning_rate:g}. Give fewer (or --warmup_ratio, a share of the run), or train longer"
        )
    if warmup >= steps:
        log_once(
            f"--warmup_ratio {schedule.warmup_ratio:g} is {warmup:,} of this run's {steps:,} step(s): the learning "
            f"rate never reaches {schedule.learning_rate:g}"
        )


def make_scheduler(schedule: ScheduleSection, steps: int) -> LRScheduler:
    """PaddleNLP's annealing schedules (they end at min_learning_rate), or a constant after the warm-up.

    `constant` warms up too where that is asked for; transformers and PaddleNLP leave its warm-up out without a word.
    """
    warmup = warmup_steps(schedule, steps)
    decay = max(schedule.decay_steps or steps, warmup + 1)
    if schedule.lr_scheduler_type == "cosine":
        return CosineAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    if schedule.lr_scheduler_type == "linear":
        return LinearAnnealingWithWarmupDecay(schedule.learning_rate, schedule.min_learning_rate, warmup, decay)
    return LambdaDecay(schedule.learning_rate, lambda step: min(1.0, step / warmup) if warmup else 1.0)


def rate_change(schedule: ScheduleSection, steps: int, before: dict[str, Any], steps_before: int, done: int) -> str:
    """What a resumed run has to say of its next step's learning rate; "" where it is that of the run so far.

    Args:
        schedule, steps: of the run now.
        before: the options that the checkpoint was written with.
        steps_before: that the run then had.
        done: steps behind it.
    """
    known = {field.name: before[field.name] for field in fields(ScheduleSection) if field.name in before}
    now, then = _rate(schedule, steps, done), _rate(ScheduleSection(**known), steps_before, done)
    if math.isclose(now, then, rel_tol=1e-9):
        return ""
    return (
        f"the learning rate changes from here: step {done + 1:,} has {now:.4g} in a run of {steps:,} steps, and had "
        f"{then:.4g} in the run of {steps_before:,} steps that the checkpoint is from"
    )


def _rate(schedule: ScheduleSection, steps: int, done: int) -> float:
    """Of the step after `done` ones."""
    scheduler = make_scheduler(schedule, steps)
    scheduler.step(done)
    return float(scheduler())
