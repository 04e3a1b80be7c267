"""The best evaluation, early stopping, and the rules of their options."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.metric_names import METRICS
from oarlock.errors import ConfigError
from oarlock.train.checkpoint.manifest import MANIFEST, Manifest
from oarlock.train.checkpoint.resume import ResumePoint
from oarlock.train.evaluation.best import BestEvaluation

TRAIN = ["--do_train", "--do_eval"]


def best(*words: str, resume: ResumePoint | None = None) -> BestEvaluation:
    return BestEvaluation.from_config(load_config(FinetuneConfig, [*TRAIN, "--do_generation", *words]).config, resume)


def seen(state: BestEvaluation, *values: float) -> list[bool]:
    return [state.observe(value, 10 * i, Path(f"checkpoint-{10 * i}")) for i, value in enumerate(values, 1)]


def test_lower_loss_and_higher_bleu_are_better():
    assert seen(best(), 3.0, 2.0, 2.0, 2.5, 1.0) == [True, True, False, False, True]
    assert seen(best("--metric_for_best_model", "bleu"), 3.0, 2.0, 3.0, 4.0) == [True, False, False, True]


def test_patience_counts_evaluations_in_a_row():
    state = best("--early_stopping_patience", "2")
    for value, exhausted in ((3, False), (4, False), (2, False), (2, False), (2.5, True)):
        state.observe(value, 1, Path("checkpoint-1"))
        assert state.exhausted == exhausted
    assert not best().exhausted


def test_the_threshold_affects_patience_only():
    """As in PaddleNLP's EarlyStoppingCallback: compared with the newest best value, however small its improvement."""
    state = best("--early_stopping_patience", "3", "--early_stopping_threshold", "0.5", "--load_best_model_at_end")
    assert seen(state, 3.0, 2.6, 2.2, 1.8) == [True] * 4
    assert state.exhausted and state.value == 1.8 and state.folder == Path("checkpoint-40")
    state.observe(1.2, 50, Path("checkpoint-50"))
    assert not state.exhausted and state.evaluations_since == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_metric_is_never_the_best(value):
    state = best()
    assert seen(state, value, 2.0, value) == [False, True, False] and state.evaluations_since == 1
    assert "no evaluation had a finite eval_loss" in best().describe()


def resume_point(folder: Path, state: BestEvaluation) -> ResumePoint:
    manifest = Manifest(
        40, 1, 1, {"last_epoch": 40, "last_lr": 0.1}, (0.0, 0), {}, "", best=json.loads(json.dumps(state.state()))
    )
    return ResumePoint(folder / "checkpoint-40", manifest)


@given(values=st.lists(st.floats(0, 9), max_size=12), cut=st.integers(0, 12), threshold=st.sampled_from([0.0, 1.0]))
def test_a_resumed_state_continues_unchanged(tmp_path_factory, values, cut, threshold):
    words = ["--early_stopping_patience", "3", "--early_stopping_threshold", str(threshold)]
    whole, first = best(*words), best(*words)
    seen(whole, *values)
    seen(first, *values[:cut])
    second = best(*words, resume=resume_point(tmp_path_factory.getbasetemp(), first))
    for i, value in enumerate(values[cut:], cut + 1):
        second.observe(value, 10 * i, Path(f"checkpoint-{10 * i}"))
    assert second == whole


def test_a_deleted_best_checkpoint_is_ignored(tmp_path, capsys):
    state = best("--load_best_model_at_end")
    seen(state, 3.0, 4.0)
    words = ["--load_best_model_at_end"]
    assert best(*words, resume=resume_point(tmp_path, state)).value is None
    assert "checkpoint-10 is missing: it is ignored" in capsys.readouterr().out
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / MANIFEST).write_text("{}")
    resumed = best(*words, resume=resume_point(tmp_path, state))
    assert resumed.value == 3.0 and resumed.folder == tmp_path / "checkpoint-10" and resumed.evaluations_since == 1
    other = best(*words, "--metric_for_best_model", "eval_bleu", resume=resume_point(tmp_path, state))
    assert other.value is None and "changed from eval_loss to eval_bleu" in capsys.readouterr().out
    plain = best()
    seen(plain, 3.0)
    assert best(*words, resume=resume_point(tmp_path, plain)).value is None
    assert "its weights were not kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--do_train", "--load_best_model_at_end"], "--load_best_model_at_end compares evaluations: add --do_eval"),
        (["--do_train", "--early_stopping_patience", "2"], "--early_stopping_patience compares evaluations"),
        (["--do_eval", "--early_stopping_patience", "2"], "--early_stopping_patience is for training"),
        ([*TRAIN, "--load_best_model_at_end", "--save_strategy", "no"], "use --save_strategy steps or epoch"),
        ([*TRAIN, "--early_stopping_threshold", "0.1"], "--early_stopping_threshold needs --early_stopping_patience"),
        ([*TRAIN, "--metric_for_best_model", "rouge_L"], "did you mean eval_rouge_l?"),
        ([*TRAIN, "--metric_for_best_model", "bleu"], "add --do_generation"),
        ([*TRAIN, "--greater_is_better", "1"], "--greater_is_better True is wrong: a lower loss is better"),
        (["--do_train", "--eval_prompts", "x"], "--eval_prompts are answered in evaluations: add --do_eval"),
    ],
)
def test_impossible_combinations_are_reported(words, expected):
    with pytest.raises(ConfigError) as error:
        load_config(FinetuneConfig, words)
    assert expected in str(error.value)


def test_pretraining_has_no_answers_to_score():
    with pytest.raises(ConfigError, match="metric of fine-tuning"):
        load_config(PretrainConfig, [*TRAIN, "--metric_for_best_model", "eval_bleu"])
    assert load_config(PretrainConfig, [*TRAIN, "--metric_for_best_model", "perplexity", "--greater_is_better", "no"])


def test_every_metric_is_in_the_help():
    from oarlock.config.options import list_option_specs

    text = list_option_specs(FinetuneConfig)["metric_for_best_model"].help
    assert all(name in text for name in METRICS)
