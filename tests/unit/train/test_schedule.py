"""Learning rates, steps and warm-up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.config.shared import ScheduleSection
from oarlock.errors import ConfigError
from oarlock.train.optim.schedule import check_warmup, describe_rate_change, make_scheduler, warmup_steps
from oarlock.train.run_length import count_total_steps

# schedule


def compute_rates(steps: int, **options) -> list[float]:
    scheduler = make_scheduler(ScheduleSection(**options), steps)
    found = []
    for _ in range(steps + 1):
        found.append(scheduler())
        scheduler.step()
    return found


def test_cosine_ends_at_min_learning_rate():
    found = compute_rates(100, learning_rate=1.0, min_learning_rate=0.1, lr_scheduler_type="cosine", warmup_steps=10)
    assert found[0] == 0 and found[10] == pytest.approx(1.0) and found[100] == pytest.approx(0.1)
    assert found[55] == pytest.approx(0.1 + 0.9 * 0.5) and all(a > b for a, b in itertools.pairwise(found[10:]))


def test_linear_and_constant():
    found = compute_rates(10, learning_rate=1.0, lr_scheduler_type="linear", warmup_ratio=0.2)
    assert found[1] == pytest.approx(0.5) and found[6] == pytest.approx(0.5) and found[10] == pytest.approx(0.0)
    assert compute_rates(3, learning_rate=2.0, lr_scheduler_type="constant") == [2.0] * 4
    assert compute_rates(4, learning_rate=1.0, lr_scheduler_type="constant_with_warmup", warmup_steps=2) == [
        0,
        0.5,
        1,
        1,
        1,
    ]


@given(samples=st.integers(1, 1000), epochs=st.floats(0.1, 5), batch=st.integers(1, 64), steps=st.integers(0, 20))
def test_every_epoch_is_trained_completely(samples, epochs, batch, steps):
    total = count_total_steps(ScheduleSection(num_train_epochs=epochs), samples, batch, 0, 0)
    assert (total - 1) * batch < samples * epochs + 1e-3 <= total * batch + 2e-3
    done = min(steps, total)
    assert count_total_steps(ScheduleSection(num_train_epochs=epochs), samples, batch, done, done * batch) == total
    assert count_total_steps(ScheduleSection(max_steps=7), samples, batch, 3, 3) == 7


def test_a_warmup_ratio_is_rounded_up():
    found = [warmup_steps(ScheduleSection(warmup_ratio=0.03), steps) for steps in (1, 33, 34, 100, 101)]
    assert found == [1, 1, 2, 3, 4]
    assert warmup_steps(ScheduleSection(warmup_ratio=0.03, warmup_steps=7), 100) == 7


def test_a_warmup_as_long_as_the_run(capsys):
    """Given in steps, it is refused wherever the length of the run comes from; given as a ratio, it is reported."""
    for steps in (5, 6):
        with pytest.raises(ConfigError, match=f"--warmup_steps 6 leaves no step of this run, which has {steps}"):
            check_warmup(ScheduleSection(warmup_steps=6), steps)
    check_warmup(ScheduleSection(warmup_steps=6), 7)
    check_warmup(ScheduleSection(warmup_steps=6), 5, done=5)  # a complete run has no problem
    with pytest.raises(ConfigError, match="--decay_steps 10 must be above the 20 steps"):
        check_warmup(ScheduleSection(warmup_ratio=0.2, decay_steps=10), 100)
    assert capsys.readouterr().out == ""
    check_warmup(ScheduleSection(warmup_ratio=0.03, learning_rate=2e-4), 1)
    assert "is 1 of this run's 1 step(s): the learning rate never reaches 0.0002" in capsys.readouterr().out


def test_an_extended_run_reports_its_learning_rate():
    before = ScheduleSection(learning_rate=1e-3, max_steps=10)
    said = describe_rate_change(replace(before, max_steps=20), 20, vars(before), 10, 10)
    assert said.startswith("the learning rate changes: step 11 has 0.0005 in a run of 20 steps; it had 0 in")
    assert "the run of 10 steps" in said
    assert describe_rate_change(before, 10, vars(before), 10, 5) == ""
    flat = replace(before, lr_scheduler_type="constant")
    assert describe_rate_change(flat, 20, vars(flat), 10, 10) == ""
    fixed = replace(before, decay_steps=40)
    assert describe_rate_change(fixed, 20, vars(fixed), 10, 10) == ""
    assert "had 0.0001" in describe_rate_change(before, 10, {"learning_rate": 2e-4, "of a later version": 1}, 10, 5)
