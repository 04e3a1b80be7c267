"""The metrics of evaluations, and the one that decides which model is best."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.config.run_config import RunConfig

PREFIX = "eval_"


@dataclass(frozen=True)
class Metric:
    """A metric of evaluations.

    Attributes:
        greater_is_better: whether higher values are better.
        from_answers: the metric needs generated answers (--do_generation).
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
    """The name of --metric_for_best_model, with the optional prefix "eval_"."""
    name = config.evaluation.metric_for_best_model
    return str(name if name.startswith(PREFIX) else PREFIX + name)
