"""Rendering a conversation for training, and finding the spans that are trained on.

Only the model's own output is trained on: the content of an answer (with reasoning and tool calls) and the token that
ends its turn, but nothing that the template writes after that. If the template marks these spans ({% generation %}),
they are used. The text is that of one rendering of the complete conversation. Its first messages are rendered only to
find where answers start and end.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.records.conversations import Conversation
from oarlock.data.records.messages import REASONING, Message
from oarlock.data.templates.rendering import PreparedChat
from oarlock.data.templates.unrendered import check_rendered, list_stand_ins, probe_message
from oarlock.environment.console import log_once
from oarlock.errors import DataError

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatText:
    """The text of a conversation. Positions are characters.

    Attributes:
        trained: [start, end) of the trained spans, in order.
        answer: start of the last answer, which is the end of its prompt.
        answer_end: end of the last answer, including the token that ends its turn.
        forgotten: whether the template drops the reasoning of an earlier answer.
    """

    text: MarkedText
    trained: tuple[tuple[int, int], ...]
    answer: int
    answer_end: int
    forgotten: bool = False

    @property
    def cuts(self) -> tuple[int, ...]:
        """Boundaries between trained and untrained text."""
        return tuple(sorted({place for span in (*self.trained, (self.answer, self.answer_end)) for place in span}))


def render_chat_text(conversation: Conversation, template: ChatTemplate) -> ChatText:
    """Render a conversation and find its answers.

    Raises:
        DataError: with file:line, if the template fails, omits something, or changes the text so that answers
            can't be separated from prompts.
    """
    try:
        chat = template.prepare(conversation.messages, tools=conversation.tools, variables=conversation.variables)
        check_rendered(chat)
        whole, blocks = chat.run()
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        last = _find_answer(chat, answers[-1], whole)
        not_trained = conversation.not_trained
        if not _GENERATION.search(chat.source):
            trained = [_find_answer(chat, i, whole) for i in answers[:-1] if i not in not_trained]
            trained += [last] if answers[-1] not in not_trained else []
        elif not not_trained:
            trained = blocks
        else:  # the marked blocks of the answers that are trained on
            trained, before = [], 0
            for i in answers:
                end = len(blocks) if i == answers[-1] else len(chat.run(chat.messages[: i + 1])[1])
                if not before <= end <= len(blocks):
                    raise _inseparable_error(chat)
                trained += blocks[before:end] if i not in not_trained else []
                before = end
        earlier = [thought for i in answers[:-1] for thought in _find_reasoning(chat.messages[i])]
        forgotten = any(whole.count(thought, 0, last[0]) < earlier.count(thought) for thought in earlier)
        if not all(thought in whole[last[0] : last[1]] for thought in _find_reasoning(chat.messages[answers[-1]])):
            raise DataError(
                f"chat template {chat.template.name} leaves out the reasoning in messages[{answers[-1]}], which would "
                "be trained on; choose one that includes it with --chat_template"
            )
        places = [place for span in (*trained, last) for place in span]
        text, places = chat.words.reveal(whole, places)
        *trained, last = zip(places[::2], places[1::2], strict=True)
        return ChatText(text, tuple(trained), *last, forgotten=forgotten)
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error


def _find_reasoning(message: Message) -> list[str]:
    """Return the reasoning of an assistant message: its own field, or <think> in the content."""
    inside = message.get("content", "").rpartition("</think>")[0].replace("<think>", "")
    return [text.strip() for text in (message.get(REASONING[0], ""), inside) if text.strip()]


def _find_answer(chat: PreparedChat, i: int, whole: str) -> tuple[int, int]:
    """Return the [start, end) of the answer in message i."""
    prompt = None
    try:
        prompt = chat.run(chat.messages[:i], add_generation_prompt=True)[0]
    except DataError:
        if i:  # many templates can't render an empty conversation
            raise
    beginning = whole if i == len(chat.messages) - 1 else chat.run(chat.messages[: i + 1])[0]
    if prompt is not None and whole.startswith(prompt) and beginning.startswith(prompt):
        end = _find_end(chat, beginning, len(prompt))
        if whole.startswith(beginning[:end]):
            return len(prompt), end
    return _find_changed_answer(chat, i, whole, prompt)


def _find_end(chat: PreparedChat, text: str, start: int) -> int:
    """Return the end of the last answer's turn in a text. The answer starts at `start`."""
    known = chat.template.find_turn_end(chat.source)
    if known is not None and text.endswith(known[0]):
        return max(start, len(text) - len(known[0]) + len(known[1]))
    tokens = chat.template.find_special(text, start)
    return tokens[-1][1] if tokens else len(text)


def _find_changed_answer(chat: PreparedChat, i: int, whole: str, prompt: str | None) -> tuple[int, int]:
    """Find an answer if the template changes earlier rounds when later ones follow (Qwen3 drops their reasoning).

    The content of message i is replaced by stand-ins. The text around them is the text around the answer.
    """
    messages = chat.messages
    same_ids = {str(call["id"]): call["id"] for call in messages[i].get("tool_calls") or () if "id" in call}
    probe = probe_message(messages[i], i, same_ids)
    try:
        text = chat.run([*messages[:i], probe, *messages[i + 1 :]])[0]
        alone = chat.run([*messages[:i], probe])[0]
        before = chat.run(messages[:i])[0] if i else ""
    except DataError as error:
        raise _inseparable_error(chat) from error
    found = [place for word in list_stand_ins(probe) for place in _find_all(text, word)]
    if not found or (i == len(messages) - 1 and not whole.startswith(before)):
        raise _inseparable_error(chat)
    start, rest = min(found)[0], text[max(end for _, end in found) :]
    opening = prompt[len(before) :] if prompt is not None and prompt.startswith(before) else ""
    at = text.rfind(opening, 0, start) if opening else -1
    start = at + len(opening) if at >= 0 else start
    alone = alone[max((end for word in list_stand_ins(probe) for _, end in _find_all(alone, word)), default=0) :]
    at, length = _find_turn_end(chat, rest, os.path.commonprefix([rest, alone]))  # noqa: RUF071 - of characters
    rest = rest[at:]
    if whole[:start] != text[:start] or not whole.endswith(rest) or len(whole) - len(rest) < start:
        raise _inseparable_error(chat)
    if i == len(messages) - 1 and prompt is not None and not whole.startswith(prompt):
        log_once(
            f"chat template {chat.template.name} ends a prompt with {opening!r}, but does not include all of it in a "
            "complete conversation. The model is trained without it."
        )
    return start, len(whole) - len(rest) + length


def _find_turn_end(chat: PreparedChat, rest: str, common: str) -> tuple[int, int]:
    """Find the end of a turn in the text after an answer. Returns the start and length of what ends it.

    Args:
        common: the start of that text which also follows the same message at the end of a conversation.
    """
    known = chat.template.find_turn_end(chat.source)
    turn_end = known[1] if known else None
    if turn_end is not None and turn_end in common:
        return common.index(turn_end), len(turn_end)
    # An answer in the middle may end differently from the last one (gpt-oss: <|end|> and <|return|>).
    tokens = chat.template.find_special(rest)
    if not tokens:
        raise _inseparable_error(chat)
    return tokens[0][0], tokens[0][1] - tokens[0][0]


def _find_all(text: str, word: str) -> list[tuple[int, int]]:
    return [(found.start(), found.end()) for found in re.finditer(re.escape(word), text)]


def _inseparable_error(chat: PreparedChat) -> DataError:
    return DataError(
        f"chat template {chat.template.name} changes the text of earlier rounds when a later one is added, so that "
        "answers can't be separated from prompts"
    )
