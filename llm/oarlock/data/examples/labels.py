"""Token ids and labels of conversations and prompts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.records.conversations import Conversation
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.data.templates.trained_spans import ChatText, render_chat_text
from oarlock.data.tokenizers.offsets import tokenize

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

    from oarlock.data.examples.marked_encoding import TokenizedText

IGNORE_INDEX = -100  # label without a loss (the default of paddle.nn.functional.cross_entropy)


@dataclass(frozen=True)
class Example:
    """One tokenised conversation, as inputs and labels.

    Attributes:
        input_ids: [tokens - 1], all but the last token, which is only predicted.
        labels: [tokens - 1], labels[i] is the token after input_ids[i] if it is trained on, else IGNORE_INDEX.
            Models do not shift.
        truncated: whether src_length or tgt_length cut tokens off.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class Encoded:
    """One tokenised example, as it is stored.

    Attributes:
        ids: [tokens], including the last one.
        runs: alternating run lengths of tokens that are only read and tokens that are trained on, the former first.
        context, answer: number of tokens before the last answer and in it, before truncation.
        truncated: whether src_length or tgt_length cut tokens off.
        joined: whether one token spans the end of the prompt and the start of the answer. The tokens of the prompt
            alone then end differently.
    """

    ids: Sequence[int]
    runs: Sequence[int]
    context: int
    answer: int
    truncated: bool
    joined: bool = False

    @property
    def trains(self) -> bool:
        """Whether any token is trained on. The first token of an example is never predicted."""
        return sum(self.runs[1::2]) > (self.runs[0] == 0)

    def to_example(self) -> Example:
        """Return inputs and labels."""
        labels = [IGNORE_INDEX] * len(self.ids)
        end = 0
        for i, length in enumerate(self.runs):
            start, end = end, end + length
            if i % 2:
                labels[start:end] = self.ids[start:end]
        return Example(list(self.ids[:-1]), labels[1:], self.truncated)


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt for evaluation.

    Attributes:
        answer: the reference answer, "" if there is none.
        where: file:line of a prompt from --eval_prompts.
    """

    input_ids: list[int]
    text: str
    answer: str
    where: str = ""


def encode_chat(chat: ChatText, tokens: TokenizedText, src_length: int, tgt_length: int) -> Encoded:
    """Make one example from the tokens of a conversation.

    A token is trained on if any of its characters is. A token that spans the end of a prompt and the start of its
    answer therefore belongs to the answer. The context before the last answer keeps its last src_length tokens, and the
    last answer keeps its first tgt_length.
    """
    starts = [start for start, _ in tokens.offsets]
    ends = [end for _, end in tokens.offsets]
    answer = bisect_right(ends, chat.answer)
    answer_end = max(answer, bisect_left(starts, chat.answer_end))
    first, last = max(0, answer - src_length), min(len(tokens.ids), answer + tgt_length)
    runs, done = [], first
    for start, end in chat.trained:
        begin, stop = max(done, bisect_right(ends, start)), min(last, bisect_left(starts, end))
        if begin < stop:
            runs += [begin - done, stop - begin]
            done = stop
    runs += [last - done] if done < last else []
    cut = first > 0 or answer_end > last
    joined = answer < len(starts) and starts[answer] < chat.answer
    return Encoded(tokens.ids[first:last], runs, answer, answer_end - answer, cut, joined)


def encode_prompt(
    conversation: Conversation, tokenizer: PretrainedTokenizerBase, template: ChatTemplate, src_length: int
) -> EvalPrompt:
    """Make the prompt of a conversation's last answer, truncated like the context in training."""
    *context, last = conversation.messages
    answer = last.get("content", "")
    chat = render_chat_text(conversation, template) if last.get("tool_calls") or not context else None
    if chat is not None and last.get("tool_calls"):
        turn_end = template.find_turn_end()
        answer = chat.text.text[chat.answer : chat.answer_end].removesuffix(turn_end[1] if turn_end else "")
    if chat is not None and not context:
        text = MarkedText(chat.text.text[: chat.answer])  # what the template puts before the first message
    else:
        text = template.render_chat(
            context, add_generation_prompt=True, tools=conversation.tools, variables=conversation.variables
        ).text
    (tokens,) = tokenize(tokenizer, [text])
    return EvalPrompt(tokens.ids[-src_length:], text.text, answer)
