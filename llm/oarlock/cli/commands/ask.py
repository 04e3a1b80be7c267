"""`oarlock ask`."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.cli.flags import Command, flag, positional
from oarlock.config.options import at_least
from oarlock.environment.paddle_import import import_paddle


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """Options of `oarlock ask`."""

    model: str = positional(metavar="DIR")
    """Model folder or adapter folder."""
    base: str | None = flag(None, metavar="DIR")
    """Base model of an adapter, if it has moved since training."""
    question: tuple[str, ...] = positional()
    """Questions. Each gets an answer of its own."""
    max_new_tokens: int | None = flag(None, at_least(1))
    """Longest answer in tokens. Default: 64, or as many as fit in the context."""


def _run(options: AskOptions) -> int:
    import_paddle()
    from oarlock.models.generate import ask_model

    for question, answer in ask_model(options.model, options.question, options.max_new_tokens, options.base):
        print(f"Q: {question.replace(chr(10), ' / ')}\nA: {answer}")
    return 0


COMMAND = Command("ask", "Ask a trained model; the chat template saved with it is used.", AskOptions, _run)
