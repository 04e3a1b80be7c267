"""Conversations -> token ids and labels: what is read, and what is trained on."""

from __future__ import annotations

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
class Prompt:
    """What a model is asked in evaluation, the right answer ("" where there is none), and file:line of fixed ones."""

    input_ids: list[int]
    text: str
    answer: str
    where: str = ""


def encode_text(tokenizer: PretrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which the template has put all special tokens already."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]) if text else []


def encode_conversation(
    conversation: Conversation,
    tokenizer: PretrainedTokenizerBase,
    template: ChatTemplate,
    src_length: int,
    tgt_length: int,
) -> Example:
    """Tokenise a conversation; the assistant's texts (with the end token the template puts) are trained on.

    Prompt and answer are tokenised apart, as they are when the model is asked. The context before the last answer
    keeps its last src_length tokens, the last answer its first tgt_length.

    Raises:
        DataError: when the template is not consistent (a longer conversation must begin as the shorter one did).
    """
    ids: list[int] = []
    trained: list[bool] = []
    answer_start, done = 0, ""
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(conversation.messages[:i], add_generation_prompt=True)
        whole = template.render(conversation.messages[: i + 1])
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise DataError(
                f"{conversation.where}: chat template {template.name} changes the text of earlier rounds when a later "
                "one is added, so that answers can't be told from prompts"
            )
        question, answer = encode_text(tokenizer, prompt[len(done) :]), encode_text(tokenizer, whole[len(prompt) :])
        answer_start = len(ids) + len(question)
        ids += question + answer
        trained += [False] * len(question) + [True] * len(answer)
        done = whole
    first = max(0, answer_start - src_length)
    last = min(len(ids), answer_start + tgt_length)
    kept, flags = ids[first:last], trained[first:last]
    labels = [token if flag else IGNORE_INDEX for token, flag in zip(kept[1:], flags[1:], strict=True)]
    return Example(kept[:-1], labels, last - first < len(ids))


def encode_prompt(
    conversation: Conversation, tokenizer: PretrainedTokenizerBase, template: ChatTemplate, src_length: int
) -> Prompt:
    """The prompt of a conversation's last answer, cut like the training context."""
    text = template.render(conversation.messages[:-1], add_generation_prompt=True)
    return Prompt(encode_text(tokenizer, text)[-src_length:], text, conversation.messages[-1]["content"])
