"""A conversation with an engine: what was said is kept, and the oldest of it dropped where the context is full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from oarlock.errors import OarlockError
from oarlock.sampling.params import SamplingParams
from oarlock.serve.request import Prompt, PromptTooLong

if TYPE_CHECKING:
    from oarlock.serve.engine.engine import Engine

Message = dict[str, str]


class AnswerFailed(OarlockError):
    """An answer ended with an error; the conversation is as it was before the question."""


class Chat:
    """See the module.

    Attributes:
        dropped: questions that were dropped with their answers for want of room.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, system: str = "", adapter: str | None = None) -> None:
        """A new conversation.

        Args:
            system: text that stands before it, and is never dropped.
        """
        self._engine, self._sampling, self._adapter = engine, sampling, adapter
        self._begin: list[Message] = [{"role": "system", "content": system}] if system else []
        self._rounds: list[tuple[Message, Message]] = []
        self.dropped = 0

    def reset(self) -> None:
        """Begin anew."""
        self._rounds.clear()

    @property
    def messages(self) -> list[Message]:
        """All that was said and is kept."""
        return [*self._begin, *(message for both in self._rounds for message in both)]

    def ask(self, text: str) -> Iterator[str]:
        """The answer, as it comes, without white space around it. One that is broken off is kept as far as it came.

        Raises:
            RequestRefused: when the question alone is too long, or the template has no place for it.
            QueueFull: when others ask too much.
            AnswerFailed: when the engine could not answer.
        """
        question = {"role": "user", "content": text}
        pieces = self._pieces(question)
        answer = held = ""
        try:
            for piece in pieces:
                new = held + piece if answer else (held + piece).lstrip()
                shown = new.rstrip()
                held = new[len(shown) :]
                if shown:
                    answer += shown
                    yield shown
        except AnswerFailed:
            raise
        except BaseException:  # the reader went away, or Ctrl-C
            self._keep(question, answer)
            raise
        self._keep(question, answer)

    def _keep(self, question: Message, answer: str) -> None:
        self._rounds.append((question, {"role": "assistant", "content": answer}))

    def _pieces(self, question: Message) -> Iterator[str]:
        while True:
            prompt = Prompt(messages=[*self.messages, question], adapter=self._adapter)
            try:
                for piece in self._engine.stream(prompt, self._sampling):
                    yield piece.text
                    if piece.finish_reason == "error":
                        raise AnswerFailed(f"no answer: {piece.error}")
                return
            except PromptTooLong:
                if not self._rounds:
                    raise
                del self._rounds[0]
                self.dropped += 1
