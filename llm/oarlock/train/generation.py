"""Greedy answers in batches, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oarlock.data.labels import Prompt
from oarlock.environment import progress_bar
from oarlock.models.generate import generate_ids


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
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Greedy answers, in the order of the prompts.

    Prompts of like length share a batch.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    texts: dict[int, str] = {}
    with progress_bar(len(prompts), "generate", "answer", leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = generate_ids(model, tokenizer, [prompts[i].input_ids for i in chosen], max_new_tokens)
            for i, row in zip(chosen, rows, strict=True):
                texts[i] = tokenizer.decode(row, skip_special_tokens=True)
            bar.update(len(chosen))
    if was_training:
        model.train()
    return [Answer(prompt, texts[i]) for i, prompt in enumerate(prompts)]
