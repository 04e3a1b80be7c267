"""The figures an evaluation gives, and which of them says what the best model is."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.config.run_config import RunConfig

PREFIX = "eval_"


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        greater_is_better: which way is better.
        from_answers: it needs --do_generation.
    """

    greater_is_better: bool
    from_answers: bool = False


METRICS = {
    "eval_loss": Metric(greater_is_better=False),
    "eval_perplexity": Metric(greater_is_better=False),
    "eval_exact_match": Metric(greater_is_better=True, from_answers=True),
    "eval_bleu": Metric(greater_is_better=True, from_answers=True),
    "eval_rouge_1": Metric(greater_is_better=True, from_answers=True),
    "eval_rouge_2": Metric(greater_is_better=True, from_answers=True),
    "eval_rouge_l": Metric(greater_is_better=True, from_answers=True),
}


def best_metric(config: RunConfig) -> str:
    """The name of --metric_for_best_model, which may be given with or without "eval_" (as in PaddleNLP)."""
    name = config.evaluation.metric_for_best_model
    return str(name if name.startswith(PREFIX) else PREFIX + name)
