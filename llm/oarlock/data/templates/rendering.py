"""A conversation and its chat template: the text of the whole, and of its beginnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.records.messages import Message
from oarlock.data.templates.jinja_environment import Refused, failing_line, run_template
from oarlock.data.templates.jinja_limits import OverBudget
from oarlock.data.templates.special_token_text import Words
from oarlock.errors import DataError

_CONTINUE = "CONTINUE9f2c "


class TemplateStopped(DataError):
    """A template ran too long, or made too much."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation.

    Attributes:
        text: with the places where users' words spell a special token.
        generations: [start, end) of what stands between {% generation %} and {% endgeneration %}.
    """

    text: MarkedText
    generations: tuple[tuple[int, int], ...]


class Template(Protocol):
    """What a conversation needs of its chat template (see oarlock.data.templates.chat_template.ChatTemplate).

    Attributes:
        name: for messages.
        special_tokens: values of bos_token, eos_token, ...
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """See above."""
        ...

    def turn_end(self, source: str | None = None) -> tuple[str, str] | None:
        """What stands after the words of a last answer, and the beginning of it that ends the turn."""
        ...

    def special_in(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Where a text with placeholders holds special tokens, which are the template's own."""
        ...


@dataclass(frozen=True)
class PreparedChat:
    """A conversation ready for its template: the beginnings of one are rendered with the same placeholders.

    Attributes:
        source: the template's text (with tools it may be another one).
        messages, tools, documents: as the template gets them.
        words: users' words in them.
    """

    template: Template
    source: str
    messages: list[Message]
    tools: list[Message] | None
    documents: Any
    variables: Mapping[str, Any]
    words: Words

    def run(
        self, messages: Sequence[Message] | None = None, add_generation_prompt: bool = False, tools: Any = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of these messages (of all, where not given), placeholders in it, and its generation blocks.

        Args:
            tools: in place of the conversation's own.

        Raises:
            DataError: with the template's own complaint (a role it does not know, for example) or failure.
        """
        name = self.template.name
        variables = {
            **self.template.special_tokens,
            **self.variables,
            "messages": self.messages if messages is None else list(messages),
            "tools": tools or self.tools,
            "documents": self.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return run_template(self.source, variables, self.words.size, (self.words.show, self.words.hide_in))
        except Refused as error:
            raise DataError(f"chat template {name} refuses these messages: {error.message}") from error
        except OverBudget as error:
            raise TemplateStopped(f"chat template {name}{place_of(error)} is stopped: {error}") from error
        except Exception as error:  # a template is a program: it may add text to a number
            raise DataError(f"chat template {name}{place_of(error)} fails: {type(error).__name__}: {error}") from error


def place_of(error: BaseException) -> str:
    """ ", line N,": where in its template an error happened, or nothing."""
    line = failing_line(error)
    return f", line {line}," if line else ""


def continued(chat: PreparedChat) -> RenderedChat:
    """The text up to the end of the last message's words, as transformers finds it."""
    last = chat.messages[-1]
    if not last.get("content"):
        raise DataError("the last message has no content to go on from")
    text, _ = chat.run([*chat.messages[:-1], {**last, "content": last["content"] + _CONTINUE}])
    at = text.rfind(_CONTINUE.strip())
    if at < 0:
        raise DataError(
            f"chat template {chat.template.name} changes the last message's text, so that it can't be continued"
        )
    kept = text[:at] if text[at : at + len(_CONTINUE)] == _CONTINUE else text[:at].rstrip()
    return RenderedChat(chat.words.reveal(kept)[0], ())
