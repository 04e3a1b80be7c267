"""Greedy answers in batches under any plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from oarlock.data.examples.labels import Prompt
from oarlock.environment.console import log_once, progress_bar
from oarlock.model_config.generation_config import end_tokens
from oarlock.models.generate import generate_ids, generate_without_cache
from oarlock.train.pipeline_step import pipeline_next_ids

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    prompt: Prompt
    text: str

    def row(self) -> dict[str, str]:
        """For samples.jsonl: prompt, answer, expected; and the source (file:line) of a fixed prompt."""
        source = {"source": self.prompt.where} if self.prompt.where else {}
        expected = {"expected": self.prompt.answer} if self.prompt.answer else {}
        return source | {"prompt": self.prompt.text, "answer": self.text} | expected


def generate_answers(
    trainer: OarlockTrainer, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
) -> list[Answer]:
    """Greedy answers, in the order of the prompts; every rank gets them all.

    Prompts of like length share a batch.
    """
    tokenizer = trainer.tokenizer
    was_training = trainer.model.training
    trainer.model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    texts: dict[int, str] = {}
    with progress_bar(len(prompts), "generate", "answer", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = _generate(trainer, [prompts[i].input_ids for i in chosen], max_new_tokens)
            for i, row in zip(chosen, rows, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = trainer.template.answer_in(text) if trainer.template is not None else text
            bar.update(len(chosen))
    if was_training:
        trainer.model.train()
    return [Answer(prompt, texts[i]) for i, prompt in enumerate(prompts)]


def _generate(trainer: OarlockTrainer, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    if trainer.plan.pipeline > 1:
        return _generate_through_pipeline(trainer, rows, max_new_tokens)
    config = trainer.model.config
    split, config.tensor_parallel_output = config.tensor_parallel_output, False  # whole scores on every rank
    try:
        return generate_ids(trainer.model, trainer.tokenizer, rows, max_new_tokens, _ends(trainer))
    finally:
        config.tensor_parallel_output = split


def _generate_through_pipeline(trainer: OarlockTrainer, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """One forward pass of all stages for every new token: PipelineParallel keeps no keys and values."""
    log_once("generation through pipeline stages computes every token anew (no cache); it is slow for long answers")
    next_ids = partial(pipeline_next_ids, trainer.pipeline_model(), pad_id=0)
    return generate_without_cache(next_ids, rows, _ends(trainer), max_new_tokens)


def _ends(trainer: OarlockTrainer) -> tuple[int, ...]:
    return end_tokens(trainer.generation, trainer.model.config, trainer.tokenizer)
