"""Conversations -> token ids and labels: what is read, and what is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oarlock.data.records import Conversation
from oarlock.data.templates import ChatTemplate
from oarlock.errors import DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

IGNORE_INDEX = -100  # labels that no loss is computed for (paddle.nn.functional.cross_entropy's default)


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    Attributes:
        input_ids: [tokens - 1], without the last token, which is only predicted.
        labels: [tokens - 1], labels[i] is the token after input_ids[i] where it is trained on, else IGNORE_INDEX
            (PaddleNLP's models do not shift).
        truncated: whether src_length or tgt_length cut something.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool


@dataclass(frozen=True)
class Encoded:
    """One tokenised example as it is kept.

    Attributes:
        ids: [tokens], the last one included.
        runs: lengths of the stretches that are read only and trained on, in turn, beginning with read only.
        context, answer: tokens before the last answer and from it on, before anything was cut.
        truncated: whether src_length or tgt_length cut something.
    """

    ids: Sequence[int]
    runs: Sequence[int]
    context: int
    answer: int
    truncated: bool

    @property
    def trains(self) -> bool:
        """Whether any token is trained on (the first one of an example is never predicted)."""
        return sum(self.runs[1::2]) > (self.runs[0] == 0)

    def example(self) -> Example:
        """Inputs and labels."""
        labels = [IGNORE_INDEX] * len(self.ids)
        end = 0
        for i, length in enumerate(self.runs):
            start, end = end, end + length
            if i % 2:
                labels[start:end] = self.ids[start:end]
        return Example(list(self.ids[:-1]), labels[1:], self.truncated)


@dataclass(frozen=True)
class Span:
    """A stretch of a conversation's text. An answer begins a span of its own."""

    text: str
    answer: bool
    trained: bool


@dataclass(frozen=True)
class Prompt:
    """What a model is asked in evaluation, the right answer ("" where there is none), and file:line of fixed ones."""

    input_ids: list[int]
    text: str
    answer: str
    where: str = ""


def encode_text(tokenizer: PretrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which the template has put all special tokens already."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]) if text else []


def conversation_spans(conversation: Conversation, template: ChatTemplate) -> list[Span]:
    """Prompts and answers in turn, the last one an answer; each is tokenised apart, as when the model is asked.

    The assistant's texts, with the end token that the template puts, are trained on.

    Raises:
        DataError: when the template is not consistent (a longer conversation must begin as the shorter one did).
    """
    spans, done = [], ""
    try:
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            prompt = template.render(conversation.messages[:i], add_generation_prompt=True)
            whole = template.render(conversation.messages[: i + 1])
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    f"chat template {template.name} changes the text of earlier rounds when a later one is added, so "
                    "that answers can't be told from prompts"
                )
            spans.append(Span(prompt[len(done) :], answer=False, trained=False))
            spans.append(Span(whole[len(prompt) :], answer=True, trained=i not in conversation.not_trained))
            done = whole
    except DataError as error:
        raise DataError(f"{conversation.where}: {error}") from error
    return spans


def join_spans(spans: Sequence[Span], rows: Sequence[Sequence[int]], src_length: int, tgt_length: int) -> Encoded:
    """The spans of a conversation, whose ids are `rows`, as one example.

    The context before the last answer keeps its last src_length tokens, the last answer its first tgt_length.
    """
    ids = [token for row in rows for token in row]
    answer_start = len(ids) - len(rows[-1])
    first, last = max(0, answer_start - src_length), min(len(ids), answer_start + tgt_length)
    runs, end = [0], 0
    for span, row in zip(spans, rows, strict=True):
        start, end = end, end + len(row)
        length = max(0, min(end, last) - max(start, first))
        if length and span.trained != (len(runs) % 2 == 0):
            runs.append(0)
        runs[-1] += length
    return Encoded(ids[first:last], runs, answer_start, len(rows[-1]), last - first < len(ids))


def encode_prompt(
    conversation: Conversation, tokenizer: PretrainedTokenizerBase, template: ChatTemplate, src_length: int
) -> Prompt:
    """The prompt of a conversation's last answer, cut like the training context."""
    text = template.render(conversation.messages[:-1], add_generation_prompt=True)
    return Prompt(encode_text(tokenizer, text)[-src_length:], text, conversation.messages[-1]["content"])
