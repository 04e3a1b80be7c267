"""When to log, evaluate and save; evaluation batches; the quickstart report; errors of several ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import ROOT
from oarlock.config import FinetuneConfig, load_config
from oarlock.data.corpus.sampler import EvaluationBatchSampler
from oarlock.errors import DataError, StoppedWithOthers, exit_with
from oarlock.parallel.object_collectives import all_gather_objects, run_on_all_ranks
from oarlock.train.intervals import DueActions, choose_due_actions


def due(
    step: int, *words: str, before: int = 0, after: int = 8, epoch: int = 100, stopping: bool = False
) -> DueActions:
    config = load_config(FinetuneConfig, ["--do_train", *words]).config
    return choose_due_actions(config, step, 50, before, after, epoch, stopping)


def test_actions_due_at_each_step():
    words = ["--logging_steps", "5", "--save_steps", "10", "--do_eval", "--eval_steps", "20"]
    assert due(3, *words) == DueActions(False, False, False)
    assert due(5, *words) == DueActions(True, False, False)
    assert due(10, *words) == DueActions(True, False, True)
    assert due(20, *words) == DueActions(True, True, True)
    assert due(50, *words) == DueActions(True, True, True)


def test_epochs_are_counted_in_samples():
    words = ["--save_strategy", "epoch", "--do_eval"]
    assert due(3, *words, before=96, after=104) == DueActions(False, True, True)
    assert due(3, *words, before=88, after=96) == DueActions(False, False, False)


def test_the_last_step_logs_and_saves_unless_disabled():
    assert due(50) == DueActions(True, False, True)
    assert due(50, "--save_strategy", "no") == DueActions(True, False, False)


def test_sigterm_saves_and_does_not_evaluate():
    words = ["--eval_steps", "20", "--save_strategy", "no"]
    assert due(20, "--do_eval", *words, stopping=True) == DueActions(True, False, True, owed=True)
    assert not due(21, "--do_eval", *words, stopping=True).owed and not due(20, *words, stopping=True).owed


@given(size=st.integers(1, 50), batch=st.integers(1, 7), replicas=st.integers(1, 4))
def test_evaluation_counts_every_sample_once(size, batch, replicas):
    samplers = [EvaluationBatchSampler([size], batch, replicas, r) for r in range(replicas)]
    counted = []
    for sampler in samplers:
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(batches)
        for t, indices in enumerate(batches):
            counted += indices[: sampler.count_real(t)]
    assert sorted(counted) == list(range(size))
    assert len({len(sampler) for sampler in samplers}) == 1


def test_the_quickstart_report(tmp_path):
    for run, rows in (
        ("pretrained", [{"eval_perplexity": 6000.0}, {"eval_perplexity": 150.2}]),
        ("tuned", [{"eval_exact_match": 0.0}, {"loss": 1}, {"eval_exact_match": 0.95}]),
    ):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "answers.txt").write_text("Q: a\nA: b\n")
    report = [sys.executable, str(ROOT / "scripts/quickstart_report.py"), str(tmp_path), "125"]
    result = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    for part in (
        "before pretraining 6,000, after 150",
        "0.000, after 0.950",
        "Q: a\nA: b",
        "2 min 5 s",
        "visualdl --logdir",
    ):
        assert part in result


def test_one_process_gathers_only_its_own_object():
    assert all_gather_objects("x") == ["x"]
    run_on_all_ranks(lambda: None)
    with pytest.raises(DataError, match="mine"):
        run_on_all_ranks(lambda: (_ for _ in ()).throw(DataError("mine")))


@pytest.mark.parametrize(
    ("error", "code", "said"), [(DataError("told"), 1, "oarlock: error: told"), (StoppedWithOthers("x"), 1, "")]
)
def test_errors_are_reported_once_without_a_traceback(capsys, error, code, said):
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as exited:
        exit_with(fail)
    assert exited.value.code == code and capsys.readouterr().err.strip() == said
