"""Generated answers at evaluations: to held-out prompts (--do_generation) and to those of a file (--eval_prompts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oarlock.environment.console import get_logger
from oarlock.train.evaluation.answer_metrics import compute_answer_metrics
from oarlock.train.evaluation.generation import generate_answers
from oarlock.train.evaluation.prompts import PromptSet

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate
    from oarlock.train.reporters.samples import SampleLog

logger = get_logger(__name__)

_SHOWN_SAMPLES = 8


@dataclass(frozen=True)
class PromptEvaluation:
    """Lets the model answer prompts, logs the answers, and scores them if expected answers are known.

    Attributes:
        samples: the log of the answers.
        generation: content of generation_config.json.
    """

    prompt_sets: Sequence[PromptSet]
    samples: SampleLog
    tokenizer: Any
    template: ChatTemplate | None = None
    generation: Mapping[str, Any] | None = None

    def run(self, model: Any, pipeline: Any, step: int, epoch: float) -> dict[str, float]:
        """Answer all prompts; returns the metrics of the scored set.

        Args:
            pipeline: PipelineParallel around the model; None if it is not split into stages.
        """
        metrics: dict[str, float] = {}
        for prompt_set in self.prompt_sets:
            answers = generate_answers(
                prompt_set, model, self.tokenizer, template=self.template, generation=self.generation, pipeline=pipeline
            )
            shown = answers[:_SHOWN_SAMPLES] if prompt_set.scored else answers
            self.samples.add(step, epoch, [answer.row() for answer in shown])
            if prompt_set.scored:
                texts, expected = [a.text for a in answers], [a.prompt.answer for a in answers]
                metrics = compute_answer_metrics(texts, expected)
                logger.info(f"exact match: {round(metrics['exact_match'] * len(answers))} of {len(answers)}")
        return metrics
