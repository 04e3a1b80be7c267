"""Rendering a conversation, or its first messages, with its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.records.messages import Message
from oarlock.data.templates.jinja_environment import Refused, find_failing_line, run_template
from oarlock.data.templates.jinja_limits import OverBudget
from oarlock.data.templates.special_token_text import Words
from oarlock.errors import DataError

_CONTINUE = "CONTINUE9f2c "


class TemplateStopped(DataError):
    """A template exceeded its limits."""


@dataclass(frozen=True)
class RenderedChat:
    """The text of a conversation.

    Attributes:
        text: with the positions where user text spells a special token.
        generations: [start, end) of the text between {% generation %} and {% endgeneration %}.
    """

    text: MarkedText
    generations: tuple[tuple[int, int], ...]


class Template(Protocol):
    """The interface of a chat template that rendering needs (see oarlock.data.templates.chat_template.ChatTemplate).

    Attributes:
        name: for messages.
        special_tokens: values of bos_token, eos_token, ...
    """

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Values of bos_token, eos_token, ..."""
        ...

    def find_turn_end(self, source: str | None = None) -> tuple[str, str] | None:
        """Return what follows the content of a last answer, and the part of it that ends the turn."""
        ...

    def find_special(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Return the [start, end) of special tokens in a text whose user text has placeholders."""
        ...


@dataclass(frozen=True)
class PreparedChat:
    """A conversation ready to render. Parts of it are rendered with the same placeholders.

    Attributes:
        source: of the template. Conversations with tools may use another one.
        messages, tools, documents: as the template gets them.
        words: the user text in them.
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
        """Render these messages (default: all). Returns the text, with placeholders, and its generation blocks.

        Args:
            tools: replace those of the conversation.

        Raises:
            DataError: if the template refuses the messages (an unknown role, for example) or fails.
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
            raise TemplateStopped(f"chat template {name}{describe_line(error)} was stopped: {error}") from error
        except Exception as error:  # a template is a program, which can fail in any way
            raise DataError(
                f"chat template {name}{describe_line(error)} fails: {type(error).__name__}: {error}"
            ) from error


def describe_line(error: BaseException) -> str:
    """Return ", line N," for the line of the template that raised an error, or ""."""
    line = find_failing_line(error)
    return f", line {line}," if line else ""


def render_continued(chat: PreparedChat) -> RenderedChat:
    """Render up to the end of the content of the last message, by the rule of transformers."""
    last = chat.messages[-1]
    if not last.get("content"):
        raise DataError("the last message has no content to continue")
    text, _ = chat.run([*chat.messages[:-1], {**last, "content": last["content"] + _CONTINUE}])
    at = text.rfind(_CONTINUE.strip())
    if at < 0:
        raise DataError(
            f"chat template {chat.template.name} changes the text of the last message, so it can't be continued"
        )
    kept = text[:at] if text[at : at + len(_CONTINUE)] == _CONTINUE else text[:at].rstrip()
    return RenderedChat(chat.words.reveal(kept)[0], ())
