"""The text of a whole conversation, and which stretches of it are trained on.

Trained on is what the model writes itself: an answer's words (reasoning and tool calls are among them) and the token
that ends its turn, never what the template puts after that. Where a template marks it ({% generation %}), it is exactly
that. A conversation is rendered whole, once; renderings of its beginnings only tell where answers begin and end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.records.conversations import Conversation
from oarlock.data.records.messages import REASONING, Message
from oarlock.data.templates.rendering import PreparedChat
from oarlock.data.templates.unrendered import check_rendered, probe_message, stand_ins
from oarlock.environment.console import log_once
from oarlock.errors import DataError

if TYPE_CHECKING:
    from oarlock.data.templates.chat_template import ChatTemplate

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatText:
    """A conversation as text; places are characters of it.

    Attributes:
        trained: [start, end) of what is trained on, in order.
        answer: where the last answer begins, which is where its prompt ends.
        answer_end: where it ends, with the token that ends its turn.
        forgotten: whether the template leaves the reasoning of an earlier answer out.
    """

    text: MarkedText
    trained: tuple[tuple[int, int], ...]
    answer: int
    answer_end: int
    forgotten: bool = False

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where stretches that are read and trained on meet."""
        return tuple(sorted({place for span in (*self.trained, (self.answer, self.answer_end)) for place in span}))


def chat_text(conversation: Conversation, template: ChatTemplate) -> ChatText:
    """Render a conversation and find its answers.

    Raises:
        DataError: naming file:line, where the template fails, leaves something out, or changes the text so that
            answers can't be told from prompts.
    """
    try:
        chat = template.prepare(conversation.messages, tools=conversation.tools, variables=conversation.variables)
        check_rendered(chat)
        return _find_answers(chat, conversation.not_trained)
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error


def _find_answers(chat: PreparedChat, not_trained: frozenset[int]) -> ChatText:
    whole, blocks = chat.run()
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    last = _answer(chat, answers[-1], whole)
    if _GENERATION.search(chat.source):
        trained = _marked(chat, answers, blocks, not_trained)
    else:
        trained = [_answer(chat, i, whole) for i in answers[:-1] if i not in not_trained]
        trained += [last] if answers[-1] not in not_trained else []
    earlier = [thought for i in answers[:-1] for thought in _thoughts(chat.messages[i])]
    forgotten = any(whole.count(thought, 0, last[0]) < earlier.count(thought) for thought in earlier)
    if not all(thought in whole[last[0] : last[1]] for thought in _thoughts(chat.messages[answers[-1]])):
        raise DataError(
            f"chat template {chat.template.name} leaves out the reasoning in messages[{answers[-1]}], which would be "
            "trained on; give one that writes it with --chat_template"
        )
    places = [place for span in (*trained, last) for place in span]
    text, places = chat.words.reveal(whole, places)
    *trained, last = zip(places[::2], places[1::2], strict=True)
    return ChatText(text, tuple(trained), *last, forgotten=forgotten)


def _thoughts(message: Message) -> list[str]:
    """What an assistant thought, in a field of its own or in <think> before its words."""
    inside = message.get("content", "").rpartition("</think>")[0].replace("<think>", "")
    return [text.strip() for text in (message.get(REASONING[0], ""), inside) if text.strip()]


def _marked(
    chat: PreparedChat, answers: Sequence[int], blocks: list[tuple[int, int]], not_trained: frozenset[int]
) -> list[tuple[int, int]]:
    """The blocks that a template marks, without those of answers that are only read."""
    if not not_trained:
        return blocks
    kept, before = [], 0
    for i in answers:
        end = len(blocks) if i == answers[-1] else len(chat.run(chat.messages[: i + 1])[1])
        if not before <= end <= len(blocks):
            raise _untold(chat)
        kept += blocks[before:end] if i not in not_trained else []
        before = end
    return kept


def _answer(chat: PreparedChat, i: int, whole: str) -> tuple[int, int]:
    """[start, end) of the answer that is message i."""
    prompt = _prompt(chat, i)
    beginning = whole if i == len(chat.messages) - 1 else chat.run(chat.messages[: i + 1])[0]
    if prompt is not None and whole.startswith(prompt) and beginning.startswith(prompt):
        end = _turn_end(chat, beginning, len(prompt))
        if whole.startswith(beginning[:end]):
            return len(prompt), end
    return _changed_answer(chat, i, whole, prompt)


def _prompt(chat: PreparedChat, i: int) -> str | None:
    try:
        return chat.run(chat.messages[:i], add_generation_prompt=True)[0]
    except DataError:
        if i:
            raise
        return None  # no message at all, for which many templates have no words


def _turn_end(chat: PreparedChat, text: str, start: int) -> int:
    """Where the turn of a text's last answer ends, which begins at start."""
    known = chat.template.turn_end(chat.source)
    if known is not None and text.endswith(known[0]):
        return max(start, len(text) - len(known[0]) + len(known[1]))
    tokens = chat.template.special_in(text, start)
    return tokens[-1][1] if tokens else len(text)


def _changed_answer(chat: PreparedChat, i: int, whole: str, prompt: str | None) -> tuple[int, int]:
    """The same where a template writes earlier rounds otherwise once later ones follow (Qwen3 drops their thoughts).

    The words of message i are replaced by stand-ins: what stands around these stands around the answer.
    """
    messages = chat.messages
    same_ids = {str(call["id"]): call["id"] for call in messages[i].get("tool_calls") or () if "id" in call}
    probe = probe_message(messages[i], i, same_ids)
    try:
        text = chat.run([*messages[:i], probe, *messages[i + 1 :]])[0]
        alone = chat.run([*messages[:i], probe])[0]
        before = chat.run(messages[:i])[0] if i else ""
    except DataError as error:
        raise _untold(chat) from error
    found = [place for word in stand_ins(probe) for place in _places(text, word)]
    if not found or (i == len(messages) - 1 and not whole.startswith(before)):
        raise _untold(chat)
    start, rest = min(found)[0], text[max(end for _, end in found) :]
    opening = prompt[len(before) :] if prompt is not None and prompt.startswith(before) else ""
    at = text.rfind(opening, 0, start) if opening else -1
    start = at + len(opening) if at >= 0 else start
    alone = alone[max((end for word in stand_ins(probe) for _, end in _places(alone, word)), default=0) :]
    at, length = _turn_end_in(chat, rest, _common_beginning(rest, alone))
    rest = rest[at:]
    if whole[:start] != text[:start] or not whole.endswith(rest) or len(whole) - len(rest) < start:
        raise _untold(chat)
    if i == len(messages) - 1 and prompt is not None and not whole.startswith(prompt):
        log_once(
            f"chat template {chat.template.name} asks with {opening!r} before an answer, but does not write all of it "
            "into a whole conversation: the model is trained without it"
        )
    return start, len(whole) - len(rest) + length


def _turn_end_in(chat: PreparedChat, rest: str, common: str) -> tuple[int, int]:
    """Where, in what follows an answer's words, its turn ends: the beginning and length of what ends it.

    Args:
        common: the beginning of it that also follows the same words as the last ones of a conversation.
    """
    known = chat.template.turn_end(chat.source)
    turn_end = known[1] if known else None
    if turn_end is not None and turn_end in common:
        return common.index(turn_end), len(turn_end)
    # An answer in the middle may end otherwise than the last one (gpt-oss: <|end|> and <|return|>).
    tokens = chat.template.special_in(rest)
    if not tokens:
        raise _untold(chat)
    return tokens[0][0], tokens[0][1] - tokens[0][0]


def _common_beginning(one: str, other: str) -> str:
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _places(text: str, word: str) -> list[tuple[int, int]]:
    return [(found.start(), found.end()) for found in re.finditer(re.escape(word), text)]


def _untold(chat: PreparedChat) -> DataError:
    return DataError(
        f"chat template {chat.template.name} changes the text of earlier rounds when a later one is added, so that "
        "answers can't be told from prompts"
    )
