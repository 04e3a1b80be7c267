"""What the model is asked at an evaluation: the held-out prompts (--do_generation) and a file's (--eval_prompts)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from oarlock.data.examples.labels import Prompt
from oarlock.environment.console import get_logger
from oarlock.train.evaluation.answer_metrics import text_scores
from oarlock.train.evaluation.generation import Answer, generate_answers

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer

logger = get_logger(__name__)

_SHOWN_SAMPLES = 8

Asking = Callable[["OarlockTrainer"], dict[str, float]]


class HeldOutPrompts:
    """Scores on the held-out prompts; the first answers go to samples.jsonl and VisualDL."""

    def __init__(self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int, max_batches: int) -> None:
        self.prompts = prompts[: max_batches * batch_size] if max_batches > 0 else prompts
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(self, trainer: OarlockTrainer) -> dict[str, float]:
        """See oarlock.train.evaluation.answer_metrics."""
        answers = generate_answers(trainer, self.prompts, self.max_new_tokens, self.batch_size)
        show(trainer, answers[:_SHOWN_SAMPLES])
        scores = text_scores([answer.text for answer in answers], [answer.prompt.answer for answer in answers])
        logger.info(f"exact match: {round(scores['exact_match'] * len(answers))} of {len(answers)}")
        return scores


class FixedPrompts:
    """Nothing but answers, all of them shown: so one sees the model change."""

    def __init__(self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int) -> None:
        self.prompts, self.max_new_tokens, self.batch_size = prompts, max_new_tokens, batch_size

    def __call__(self, trainer: OarlockTrainer) -> dict[str, float]:
        """No figures."""
        show(trainer, generate_answers(trainer, self.prompts, self.max_new_tokens, self.batch_size))
        return {}


def show(trainer: OarlockTrainer, answers: Sequence[Answer]) -> None:
    """To samples.jsonl and VisualDL."""
    if trainer.samples is not None:
        state = trainer.state
        trainer.samples.add(state.global_step, state.epoch or 0.0, [answer.row() for answer in answers])


def one_after_another(parts: Sequence[Asking]) -> Asking | None:
    """All of them as one; None for none."""
    if not parts:
        return None

    def ask(trainer: OarlockTrainer) -> dict[str, float]:
        return {name: value for part in parts for name, value in part(trainer).items()}

    return ask
