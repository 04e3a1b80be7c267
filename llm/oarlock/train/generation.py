"""Greedy answers in batches under any plan, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.labels import Prompt
from oarlock.environment import progress_bar, say_once
from oarlock.models.generate import generate_ids
from oarlock.train.pipeline import pipeline_next_ids

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    prompt: Prompt
    text: str

    @property
    def right(self) -> bool:
        """Exact match, but for space at the ends."""
        return self.text.strip() == self.prompt.answer.strip()

    def row(self) -> dict[str, str]:
        """For samples.jsonl."""
        return {"prompt": self.prompt.text, "answer": self.text, "expected": self.prompt.answer}


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
                texts[i] = tokenizer.decode(row, skip_special_tokens=True)
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
        return generate_ids(trainer.model, trainer.tokenizer, rows, max_new_tokens)
    finally:
        config.tensor_parallel_output = split


def _generate_through_pipeline(trainer: OarlockTrainer, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """One forward pass of all stages for every new token: PipelineParallel keeps no keys and values."""
    say_once("generation through pipeline stages computes every token anew (no cache); it is slow for long answers")
    tokenizer, model = trainer.tokenizer, trainer.pipeline_model()
    end = tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))
    for _ in range(max_new_tokens):
        if not going:
            break
        next_ids = pipeline_next_ids(model, [rows[i] + answers[i] for i in going], 0)
        for i, token in zip(list(going), next_ids, strict=True):
            if token == end:
                going.remove(i)
            else:
                answers[i].append(token)
    return answers
