"""A conversation with an engine. Messages are kept, and the oldest ones dropped when the context is full."""

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
    """A conversation.

    Attributes:
        dropped: number of questions that were dropped with their answers, to fit the context.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, system: str = "", adapter: str | None = None) -> None:
        """Start a conversation.

        Args:
            system: text of a system message, which is never dropped.
        """
        self._engine, self._sampling, self._adapter = engine, sampling, adapter
        self._begin: list[Message] = [{"role": "system", "content": system}] if system else []
        self._rounds: list[tuple[Message, Message]] = []
        self.dropped = 0

    def reset(self) -> None:
        """Start again."""
        self._rounds.clear()

    @property
    def messages(self) -> list[Message]:
        """The messages that are kept."""
        return [*self._begin, *(message for both in self._rounds for message in both)]

    def ask(self, message: str) -> Iterator[str]:
        """Answer a message, text by text, without white space around it. An interrupted answer is kept so far.

        Raises:
            RequestRefused: when the question alone is too long, or the template does not render it.
            QueueFull: when too many requests wait.
            AnswerFailed: when the engine could not answer.
        """
        question = {"role": "user", "content": message}
        texts = self._stream_texts(question)
        answer = held = ""
        try:
            for text in texts:
                new = held + text if answer else (held + text).lstrip()
                shown = new.rstrip()
                held = new[len(shown) :]
                if shown:
                    answer += shown
                    yield shown
        except AnswerFailed:
            raise
        except BaseException:  # the reader has left, or Ctrl-C
            self._keep(question, answer)
            raise
        self._keep(question, answer)

    def _keep(self, question: Message, answer: str) -> None:
        self._rounds.append((question, {"role": "assistant", "content": answer}))

    def _stream_texts(self, question: Message) -> Iterator[str]:
        while True:
            prompt = Prompt(messages=[*self.messages, question], adapter=self._adapter)
            try:
                for chunk in self._engine.stream(prompt, self._sampling):
                    yield chunk.text
                    if chunk.finish_reason == "error":
                        raise AnswerFailed(f"no answer: {chunk.error}")
                return
            except PromptTooLong:
                if not self._rounds:
                    raise
                del self._rounds[0]
                self.dropped += 1
