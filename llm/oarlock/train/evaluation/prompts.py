"""Prompts that a model answers at evaluations, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oarlock.data.examples.labels import EvalPrompt


@dataclass(frozen=True)
class PromptSet:
    """Prompts that the model answers at every evaluation.

    Attributes:
        max_new_tokens: longest answer.
        scored: compare the answers with the expected ones, and log only the first few; otherwise log all answers.
    """

    prompts: Sequence[EvalPrompt]
    max_new_tokens: int
    batch_size: int
    scored: bool = False


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt."""

    prompt: EvalPrompt
    text: str

    def row(self) -> dict[str, str]:
        """The row of samples.jsonl: prompt, answer, expected, and the source (file:line) of a fixed prompt."""
        source = {"source": self.prompt.where} if self.prompt.where else {}
        expected = {"expected": self.prompt.answer} if self.prompt.answer else {}
        return source | {"prompt": self.prompt.text, "answer": self.text} | expected
