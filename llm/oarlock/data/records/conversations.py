"""Fine-tuning records as people have them -> conversations, or plain text.

Forms: src/tgt (strings, or lists of equal length for several rounds), Alpaca (instruction, input, output), a question
and an answer under the names people have (question/answer, prompt/completion, query/response), ShareGPT (conversations
of from/value), OpenAI messages (role/content), and plain text (text). Every record knows its file:line, so that a wrong
one can be named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from oarlock.data.records.fields import (
    ANSWERS,
    MORE,
    QUESTIONS,
    SYSTEM,
    Conversation,
    PlainText,
    answer_text,
    one_of,
    system_of,
    text_in,
)
from oarlock.data.records.message_records import ROLES, from_chat
from oarlock.data.records.messages import Message, normalize_tools
from oarlock.data.records.training_marks import not_trained

__all__ = [
    "ANSWERS",
    "QUESTIONS",
    "READ_FIELDS",
    "ROLES",
    "Conversation",
    "Message",
    "PlainText",
    "detect_form",
    "parse_record",
]


def parse_record(item: Any, form: str, where: str) -> Conversation | PlainText:
    """A record of a known form.

    Raises:
        ValueError: naming the field and what was expected there.
    """
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, got {type(item).__name__}")
    if form != "text":
        _check_wanted(item)
    record = _FORMS[form](item, where)
    if isinstance(record, PlainText):
        if not_trained(item, [{}], [True], "text"):
            raise ValueError("the text is marked as one that is not trained on; leave it out")
        return record
    variables = item.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"field 'chat_template_kwargs' holds {type(variables).__name__}, expected an object")
    return replace(record, tools=_tools(item), variables=variables)


def _tools(item: dict[str, Any]) -> list[Message] | None:
    found = [normalize_tools(item.get(name), name) for name in ("tools", "functions")]
    if all(found) and found[0] != found[1]:
        raise ValueError("fields 'tools' and 'functions' describe different functions; leave one out")
    return found[0] or found[1]


def detect_form(item: Any) -> str:
    """The form of a record, by its fields.

    Raises:
        ValueError: listing the fields it has and the forms that are known.
    """
    if isinstance(item, dict):
        for form, fields in _FIELDS.items():
            if all(any(item.get(name) is not None for name in names) for names in fields):
                return form
    have = ", ".join(map(repr, list(item)[:8])) if isinstance(item, dict) else type(item).__name__
    raise ValueError(f"unknown form of record ({have}); {_advice(item)}known are {_known()}")


def _advice(item: Any) -> str:
    """What a record of another kind seems to be."""
    if not isinstance(item, dict):
        return ""
    if "chosen" in item or "rejected" in item:
        return "answers to choose from (chosen, rejected) are not trained on here; "
    if "input_ids" in item:
        return "data that are tokenised already (input_ids) are not read, give the text; "
    inside = next((k for k, v in item.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    return f"if the records are those of the list {inside!r}, the file has to hold this list alone; " if inside else ""


def _check_wanted(item: dict[str, Any]) -> None:
    """Refuse an answer that data for KTO marks as a bad one."""
    for name in ("label", "kto_tag"):
        if item.get(name) is False:
            raise ValueError(f"field {name!r} is false: an answer that is not wanted (KTO); leave the record out")


def other_forms(item: Any, form: str) -> list[str]:
    """Fields of a record that belong to other forms than the one it is read as, so that they are not read."""
    if not isinstance(item, dict) or form not in _READ:
        return []
    read = _READ[form]
    if form in ("sharegpt", "messages"):
        read = {*read, next((name for names in _FIELDS[form] for name in names if item.get(name) is not None), "")}
    return [name for name in _ANY_FORM if name not in read and item.get(name) not in (None, "", [])]


def _known() -> str:
    return ", ".join(f"{'/'.join(names[0] for names in fields)} ({form})" for form, fields in _FIELDS.items())


def _marked(item: dict[str, Any], messages: list[Message], where: str) -> Conversation:
    """A conversation of a form whose messages have no marks of their own."""
    answers = [message["role"] == "assistant" for message in messages]
    return Conversation(messages, where, frozenset(not_trained(item, [{}] * len(messages), answers, "messages")))


def _from_src_tgt(item: dict[str, Any], where: str) -> Conversation:
    sides = []
    for name in ("src", "tgt"):
        value = item.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            sides.append(value)
        elif isinstance(value, list):
            raise ValueError(f"field {name!r} must be text or a list of texts with at least one")
        else:
            sides.append([text_in(item, name)])
    sources, targets = sides
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} rounds in 'src' but {len(targets)} in 'tgt'")
    messages = system_of(item)
    for source, target in zip(sources, targets, strict=True):
        messages += [{"role": "user", "content": source}, {"role": "assistant", "content": answer_text(target)}]
    return _marked(item, messages, where)


def _from_alpaca(item: dict[str, Any], where: str) -> Conversation:
    return _round(item, where, "instruction", MORE, ANSWERS[::-1])


def _from_question_answer(item: dict[str, Any], where: str) -> Conversation:
    question = one_of(item, QUESTIONS[:3])
    if item.get(question) is None:
        question = one_of(item, QUESTIONS)
    if isinstance(item.get(question), list):
        return _from_prompt_messages(item, question, where)
    more = tuple(name for name in MORE if name != question)
    return _round(item, where, question, more if len(more) == 1 else MORE, ANSWERS)


def _round(
    item: dict[str, Any], where: str, question: str, more_names: Sequence[str], answer_names: Sequence[str]
) -> Conversation:
    """A system text, earlier rounds, a question with what it is about, and its answer."""
    instruction = text_in(item, question)
    more = text_in(item, one_of(item, more_names) if len(more_names) > 1 else more_names[0], required=False)
    content = f"{instruction}\n{more}" if more else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": more}
    answer = {"role": "assistant", "content": answer_text(text_in(item, one_of(item, answer_names)))}
    return _marked(item, [*system_of(item), *_history(item), user, answer], where)


def _history(item: dict[str, Any]) -> list[Message]:
    """Earlier rounds of an Alpaca record: [[question, answer], ...]."""
    rounds = item.get("history") or []
    messages: list[Message] = []
    for i, pair in enumerate(rounds if isinstance(rounds, list) else [None]):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"field 'history[{i}]' must be a pair of texts (question, answer)")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": answer_text(pair[1])}]
    return messages


def _from_prompt_messages(item: dict[str, Any], prompt: str, where: str) -> Conversation:
    """TRL's conversational prompt and completion: messages to read, then messages to train on."""
    answer = one_of(item, ANSWERS)
    completion = item.get(answer)
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": text_in(item, answer)}]
    whole = from_chat(
        {"messages": [*item[prompt], *completion], **{k: item[k] for k in SYSTEM if k in item}}, "messages", where
    )
    read = len(whole.messages) - len(completion)
    earlier = {i for i in range(read) if whole.messages[i]["role"] == "assistant"}
    if whole.unanswered:
        raise ValueError(f"field {answer!r} must end with an assistant's message")
    return replace(whole, not_trained=whole.not_trained | earlier)


def _chat(*list_fields: str) -> Callable[[dict[str, Any], str], Conversation]:
    """ShareGPT and OpenAI messages: they differ in the names of fields and roles, and data mixes those."""

    def parse(item: dict[str, Any], where: str) -> Conversation:
        name = next((name for name in list_fields if item.get(name) is not None), list_fields[0])
        return from_chat(item, name, where)

    return parse


def _from_text(item: dict[str, Any], where: str) -> PlainText:
    text = text_in(item, "text")
    if not text.strip():
        raise ValueError("field 'text' is empty: there is nothing to train on")
    return PlainText(text, where)


_FORMS: dict[str, Callable[[dict[str, Any], str], Conversation | PlainText]] = {
    "src_tgt": _from_src_tgt,
    "alpaca": _from_alpaca,
    "sharegpt": _chat("conversations", "conversation"),
    "messages": _chat("messages"),
    "question_answer": _from_question_answer,
    "text": _from_text,
}
# By which fields, one of each group, a form is told; the first that fits.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "src_tgt": (("src",), ("tgt",)),
    "alpaca": (("instruction",), ANSWERS[::-1]),
    "sharegpt": (("conversations", "conversation"),),
    "messages": (("messages",),),
    "question_answer": (QUESTIONS, ANSWERS),
    "text": (("text",),),
}
_ROUNDS = {"history", *SYSTEM}
# What each form reads of the fields that any of them has; prompt is often beside messages, and is the first of them.
_READ: dict[str, set[str]] = {
    "src_tgt": {"src", "tgt", *SYSTEM},
    "alpaca": {"instruction", *MORE, *ANSWERS, *_ROUNDS},
    "question_answer": {*QUESTIONS, *MORE, *ANSWERS, *_ROUNDS},
    "sharegpt": {"prompt", *SYSTEM},
    "messages": {"prompt", *SYSTEM},
    "text": {"text"},
}
_ANY_FORM = (
    *("src", "tgt", "instruction", "history", "conversations", "conversation", "messages", "text"),
    *SYSTEM, *QUESTIONS, *dict.fromkeys((*ANSWERS, "context")),
)  # fmt: skip
# Fields that one of the forms reads.
READ_FIELDS = frozenset(
    (
        *("src", "tgt", "instruction", "history", "conversations", "conversation", "messages", "text", "tools"),
        *("functions", "chat_template_kwargs", "from", "value", "role", "content", "name", "tool_calls"),
        *("tool_call_id", "function_call", *SYSTEM, *QUESTIONS, *ANSWERS, *MORE),
    )
)
